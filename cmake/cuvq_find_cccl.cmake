# Provides CCCL::CCCL (libcu++, CUB, Thrust): from the CUDA toolkit, from another installation, or downloaded.

# Finds a toolkit also where nvcc is missing or not on the PATH.
find_package(CUDAToolkit QUIET)

if(NOT TARGET CCCL::CCCL)
    find_package(CCCL QUIET CONFIG COMPONENTS libcudacxx CUB Thrust
                 HINTS ${CUDAToolkit_LIBRARY_DIR}/cmake ${CUDAToolkit_LIBRARY_ROOT}/lib64/cmake)
endif()

if(NOT TARGET CCCL::CCCL)
    message(STATUS "cuvq: CCCL not found (a CUDA toolkit brings it); downloading it")
    include(FetchContent)
    FetchContent_Declare(
        CCCL
        GIT_REPOSITORY https://github.com/NVIDIA/cccl.git
        GIT_TAG v3.0.3
        GIT_SHALLOW ON
        SYSTEM)
    block()
        set(BUILD_TESTING OFF)
        # An installed cuvq finds the copy that is installed with it.
        foreach(part CCCL libcudacxx CUB Thrust)
            set(${part}_ENABLE_INSTALL_RULES ${CUVQ_INSTALL})
        endforeach()
        FetchContent_MakeAvailable(CCCL)
    endblock()
endif()
