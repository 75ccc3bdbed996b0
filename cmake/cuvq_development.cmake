# The target cuvq_development: how cuvq compiles its own tests and examples. None of it reaches a user of the library.
add_library(cuvq_development INTERFACE)
target_link_libraries(cuvq_development INTERFACE cuvq::cuvq)
target_compile_options(cuvq_development INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra>
                                                  $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra>)

# OpenMP is a speed-up of the CPU path, not a requirement.
find_package(OpenMP QUIET COMPONENTS CXX)
if(OpenMP_CXX_FOUND)
    target_link_libraries(cuvq_development INTERFACE OpenMP::OpenMP_CXX)
    # Both compilers must see the same inline functions.
    target_compile_options(cuvq_development INTERFACE $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=${OpenMP_CXX_FLAGS}>)
endif()
