"""Benchmarks, run from the root of the repository: `python -m benchmarks.bench_<op>`.

    timing          seconds per call of several contenders, interleaved
    suite           a workload and its contenders: checked first, then timed
    machine         facts about the machine, and a steady memory allocator
    report          tables and JSON
    bench_q_sample, ...   one file per op family
    inspect_kernels       registers, spills and memory accesses of the compiled GPU kernels
    kernel_budget         the same against the committed budget
    traffic               bytes that the GPU kernels move, counted, and times predicted from them

Numbers mean something on a quiet machine only; ratios within one run bear some noise, because all
contenders take turns.
"""
