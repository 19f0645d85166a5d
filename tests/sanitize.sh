#!/usr/bin/env bash
# The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer: builds them in a copy of the
# working tree and runs the op tests there. Arguments go to pytest. Takes GCC; some minutes.
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

# GCC 12 takes its own AVX-512 header for a read of uninitialized memory.
sanitizers="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g"
sanitizers+=" -Wno-maybe-uninitialized"
CXX=$cxx CXXFLAGS="$sanitizers" FASTDIFF_BUILD=cpu python setup.py -q build_ext --inplace

# The runtimes come first in a process that is not itself instrumented. Leaks are Python's affair.
export LD_PRELOAD="$($cxx -print-file-name=libasan.so):$($cxx -print-file-name=libubsan.so)"
export ASAN_OPTIONS=detect_leaks=0:halt_on_error=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
# This copy, not the package that is installed.
export PYTHONPATH="$copy${PYTHONPATH:+:$PYTHONPATH}"
if [ $# -eq 0 ]; then set -- tests/ops; fi
python -c "import fastdiff, sys; sys.exit(not fastdiff.__file__.startswith('$copy'))"
python -m pytest -n 0 -q -k "cpu or bad or strides" "$@"
