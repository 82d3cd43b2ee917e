"""Built-in studies by name: one function a file, one line here; `selectra compare NAME` does one."""
