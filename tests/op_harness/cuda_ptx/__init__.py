"""csrc/cuda on the CPU: the unmodified launchers, linked to the emulator's CUDA runtime.

One module per op. Its functions have the raw operators' arguments and do in Python what
csrc/bindings does in C++; `<op>_backward` is the op's backward pass, if it has its own.
"""
