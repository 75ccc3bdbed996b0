# `cmake --install`: the headers, and the package that find_package(cuvq) reads.
include(CMakePackageConfigHelpers)
include(GNUInstallDirs)

set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/cuvq)

install(TARGETS cuvq EXPORT cuvq-targets)
install(EXPORT cuvq-targets NAMESPACE cuvq:: DESTINATION ${package_dir})
install(
    DIRECTORY ${PROJECT_SOURCE_DIR}/include/
    DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}
    FILES_MATCHING
    PATTERN "*.hpp"
    PATTERN "*.cuh")

configure_package_config_file(cmake/cuvq-config.cmake.in ${PROJECT_BINARY_DIR}/cuvq-config.cmake
                              INSTALL_DESTINATION ${package_dir})
write_basic_package_version_file(${PROJECT_BINARY_DIR}/cuvq-config-version.cmake COMPATIBILITY SameMinorVersion
                                 ARCH_INDEPENDENT)
install(FILES ${PROJECT_BINARY_DIR}/cuvq-config.cmake ${PROJECT_BINARY_DIR}/cuvq-config-version.cmake
        DESTINATION ${package_dir})
