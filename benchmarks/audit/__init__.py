"""What kernels cost, counted on any machine; run from the root of the repository.

instructions    instruction counts of the CPU kernels against a committed budget
kernel_budget   registers, spills and accesses of the compiled GPU kernels against theirs
inspect_kernels the same as tables
loops           machine instructions per element of a kernel's innermost loops
traffic         bytes that the GPU kernels move, and times predicted from them; traffic_page
                writes docs/traffic.md
executed        machine instructions that launches execute, by pipe; expansion has the table
cubin, triton_aot, in_flight   machine code taken apart; Triton kernels compiled ahead of time
"""
