# Writes into a built ELF library the SHA-256 of its code, constants and relocations, as the section .selectra.sha256:
# the sum, then the names of the sections summed. intact.py compares them before the library is loaded.
#
# The dynamic section and its strings are left out: `auditwheel repair` rewrites them, and `strip` the symbols.
# Variables: OBJCOPY, LIBRARY.
set(sections .rela.dyn .rela.plt .text .rodata .data.rel.ro .data)
set(only "")
foreach(section IN LISTS sections)
  list(APPEND only --only-section=${section})
endforeach()

set(image "${LIBRARY}.image")
set(sum "${LIBRARY}.sha256")
execute_process(COMMAND ${OBJCOPY} -O binary ${only} ${LIBRARY} ${image} RESULT_VARIABLE failed)
if(NOT failed)
  file(SHA256 ${image} digest)
  string(REPLACE ";" " " names "${sections}")
  file(WRITE ${sum} "${digest} ${names}\n")
  execute_process(COMMAND ${OBJCOPY} --add-section .selectra.sha256=${sum} ${LIBRARY} RESULT_VARIABLE failed)
endif()
if(failed)
  message(WARNING "${OBJCOPY} failed: the library carries no checksum, and damage to its file goes unnoticed")
endif()
file(REMOVE ${image} ${sum})
