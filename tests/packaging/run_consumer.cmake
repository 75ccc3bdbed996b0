# cmake -P: builds and runs one of the consumer projects beside this file, in a directory made afresh.
# -D CONSUMER        its name
# -D CUVQ_SOURCE_DIR, CUVQ_BINARY_DIR  this project and the build that the test belongs to
# -D WORK_DIR        where to build
# -D CONFIGURE_ARGS  further arguments of the consumer's configure step

function(run)
    execute_process(COMMAND ${ARGV} COMMAND_ECHO STDOUT COMMAND_ERROR_IS_FATAL ANY)
endfunction()

file(REMOVE_RECURSE ${WORK_DIR})
if(CONSUMER STREQUAL "find_package")
    run(${CMAKE_COMMAND} --install ${CUVQ_BINARY_DIR} --prefix ${WORK_DIR}/prefix)
    list(APPEND CONFIGURE_ARGS -D CMAKE_PREFIX_PATH=${WORK_DIR}/prefix)
else()
    list(APPEND CONFIGURE_ARGS -D CUVQ_SOURCE_DIR=${CUVQ_SOURCE_DIR})
endif()

run(${CMAKE_COMMAND} -S ${CMAKE_CURRENT_LIST_DIR}/${CONSUMER} -B ${WORK_DIR}/build ${CONFIGURE_ARGS})
run(${CMAKE_COMMAND} --build ${WORK_DIR}/build)
run(${WORK_DIR}/build/consumer)

# As a part of another project, cuvq has no install rules.
if(CONSUMER STREQUAL "fetch_content")
    run(${CMAKE_COMMAND} --install ${WORK_DIR}/build --prefix ${WORK_DIR}/prefix)
    if(EXISTS ${WORK_DIR}/prefix/include)
        message(FATAL_ERROR "installing the consumer installed cuvq too")
    endif()
endif()
