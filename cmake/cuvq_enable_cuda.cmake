# Sets CUVQ_CUDA: whether the tests and examples are compiled for the GPU too. The library itself is headers, so a
# project that has cuvq as a part enables the CUDA language itself, if it wants to.

set(CUVQ_ENABLE_CUDA AUTO CACHE STRING "Compile tests and examples for the GPU: AUTO (with a CUDA compiler), ON, OFF")
set_property(CACHE CUVQ_ENABLE_CUDA PROPERTY STRINGS AUTO ON OFF)

set(CUVQ_CUDA OFF)
if(NOT PROJECT_IS_TOP_LEVEL)
    if(CUVQ_ENABLE_CUDA AND CMAKE_CUDA_COMPILER)
        set(CUVQ_CUDA ON)
    endif()
    return()
endif()

if(CUVQ_ENABLE_CUDA STREQUAL "AUTO")
    include(CheckLanguage)
    check_language(CUDA)
    if(CMAKE_CUDA_COMPILER)
        set(CUVQ_CUDA ON)
    else()
        message(STATUS "cuvq: no CUDA compiler on the PATH or in CUDACXX; building the CPU path only")
    endif()
elseif(CUVQ_ENABLE_CUDA)
    set(CUVQ_CUDA ON)
endif()

if(CUVQ_CUDA)
    if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES AND NOT DEFINED ENV{CUDAARCHS})
        # The card that is here; Hopper's tensor cores, which cuvq is made for, where there is none.
        set(architecture 90a)
        find_program(CUVQ_NVIDIA_SMI nvidia-smi)
        mark_as_advanced(CUVQ_NVIDIA_SMI)
        if(CUVQ_NVIDIA_SMI)
            execute_process(COMMAND ${CUVQ_NVIDIA_SMI} --query-gpu=compute_cap --format=csv,noheader
                            OUTPUT_VARIABLE capability ERROR_QUIET)
            if(capability MATCHES "^([0-9]+)\\.([0-9]+)" AND NOT CMAKE_MATCH_0 STREQUAL "9.0")
                set(architecture ${CMAKE_MATCH_1}${CMAKE_MATCH_2})
            endif()
        endif()
        set(CMAKE_CUDA_ARCHITECTURES ${architecture} CACHE STRING "GPU architectures to compile for")
    endif()
    enable_language(CUDA)
endif()
