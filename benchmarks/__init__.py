"""Benchmarks and budgets, run from the root of the repository. docs/performance.md says how.

    python -m benchmarks [OP ...]    ops and (--end-to-end) networks, against what else there is
    pytest benchmarks/               the quick cases under pytest-benchmark

    command         the command line: choose cases, check, time, print, write
    op_table        what an op's benchmark declares; bench_q_sample, ... declare it
    suite, timing   a workload and its contenders: checked first, then timed in turns
    networks, end_to_end, bench_training_step, bench_sampling   whole networks
    bench_cpu_sampling, runtimes   sampling on a CPU, against OpenVINO, onnxruntime and others
    targets         the project's targets, judged from a report's JSON
    compare         two reports: what became slower beyond the noise
    page, plots     docs/performance.md and its pictures, made from benchmarks/results/
    machine, allocator   facts about the machine, and a steady memory allocator
    audit/          what kernels cost, counted without a GPU

Numbers mean something on a quiet machine only; ratios within one run bear some noise, because all
contenders take turns.
"""
