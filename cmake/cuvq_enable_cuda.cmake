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
        set(CMAKE_CUDA_ARCHITECTURES 90a CACHE STRING "GPU architectures to compile for")
    endif()
    enable_language(CUDA)
endif()
