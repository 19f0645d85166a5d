#!/usr/bin/env bash
# The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer: builds them in a copy of the
# working tree and runs the op tests there, once for each instruction set that this machine has,
# then random calls. Arguments go to pytest. Takes GCC; some minutes.
#
#   tests/sanitize.sh                      # every case that runs the C++ kernels
#   tests/sanitize.sh tests/ops/test_q_sample.py -x
set -euo pipefail
cd "$(dirname "$0")/.."

cxx=${CXX:-g++}
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t "$copy"
cd "$copy"

# The copy is not installed: pip knows where these are, Python alone does not.
ln -sfn ../triton_kernels fastdiff/triton_kernels
# -O1, which compiles these in a fraction of the time; the marked loops are vectorized all the
# same. GCC 12 takes its own AVX-512 header for a read of uninitialized memory.
sanitizers="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
sanitizers+=" -O1 -g1 -Wno-maybe-uninitialized"
CXX=$cxx CXXFLAGS="$sanitizers" FASTDIFF_BUILD=cpu python setup.py -q build_ext --inplace

# The runtimes come first in a process that is not itself instrumented. Leaks are Python's affair.
export LD_PRELOAD="$($cxx -print-file-name=libasan.so):$($cxx -print-file-name=libubsan.so)"
# pytest holds stderr, and a process that ASan ends never gives it back.
export ASAN_OPTIONS=detect_leaks=0:log_path=$copy/report
export UBSAN_OPTIONS=print_stacktrace=1:log_path=$copy/report
# This copy, not the package that is installed.
export PYTHONPATH="$copy${PYTHONPATH:+:$PYTHONPATH}"
if [ $# -eq 0 ]; then set -- tests/ops tests/fuzz/test_ops.py; fi
python -c "import fastdiff, sys; sys.exit(not fastdiff.__file__.startswith('$copy'))"
for isa in $(python -c "from fastdiff import _native; print(*_native.isa_names())"); do
  echo "== $isa"
  if ! FASTDIFF_CPU_ISA=$isa python -m pytest -n 0 -q -k "cpu or bad or strides" "$@"; then
    unset LD_PRELOAD
    cat "$copy"/report.* >&2 || echo "no sanitizer report: a test failed" >&2
    exit 1
  fi
done
