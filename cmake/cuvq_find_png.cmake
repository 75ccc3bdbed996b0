# Provides PNG::PNG for the image_codebook example and its test.
find_package(PNG QUIET)
if(NOT PNG_FOUND)
    message(
        FATAL_ERROR
            "libpng not found; the image_codebook example reads and writes PNG files with it. Install it: "
            "apt-get install libpng-dev (Debian, Ubuntu), dnf install libpng-devel (Fedora). "
            "Or do without the example: configure with -DCUVQ_BUILD_EXAMPLES=OFF.")
endif()
