#!/usr/bin/env bash
# Every torch that fastdiff promises to run with, with the Triton that it brings: built with it and
# run, eager and compiled, and the oldest build run under each. Prints a table; fails if a cell does.
#
#   tests/torch_matrix.sh                 # 2.10 to 2.14, one after the other: 5 GB of disk at a time
#   tests/torch_matrix.sh 2.11 2.14
#
# TORCH_MATRIX_TESTS: what is run of each, default the op tests and the backends'.
set -uo pipefail
cd "$(dirname "$0")/.."

versions=("$@")
[ ${#versions[@]} -gt 0 ] || versions=(2.10 2.11 2.12 2.13 2.14)
tests=${TORCH_MATRIX_TESTS:-"tests/ops tests/test_backends.py tests/test_out_of_memory.py"}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# A copy: builds in place of several torches would replace the libraries of this checkout.
mkdir "$work/source"
git ls-files -z | xargs -0 tar c | tar x -C "$work/source"
cd "$work/source"

table=()
failed=0
# note NAME COMMAND...: runs it, with its output in a file that is shown if it fails
note() {
  local name=$1 log="$work/log"
  shift
  if "$@" > "$log" 2>&1; then
    row+="  $name: ok"
  else
    row+="  $name: FAILED"
    failed=1
    printf '\n== torch %s, %s\n' "$version" "$name"
    tail -40 "$log"
  fi
}

for version in "${versions[@]}"; do
  printf '\n== torch %s (%ss)\n' "$version" "$SECONDS"
  row=$(printf '%-6s' "$version")
  python3 -m venv "$work/venv"
  python="$work/venv/bin/python"
  export PATH="$work/venv/bin:$PATH"
  note install "$python" -m pip install --quiet "torch==$version.*" "setuptools>=77" ninja numpy
  note build env FASTDIFF_BUILD=cpu "$python" -m pip install --quiet --no-build-isolation -e ".[test]"
  found=$("$python" -c "import torch; print(torch.__version__)" 2>&1 | tail -1)
  triton=$("$python" -c "import triton; print(triton.__version__)" 2>/dev/null || echo none)
  case $found in "$version".*) ;; *) row+="  torch: FAILED ($found)"; failed=1 ;; esac
  note "calls in C++" "$python" -c "from fastdiff import _native; assert _native.dispatch()[1] == 'C++'"
  # shellcheck disable=SC2086
  note eager "$python" -m pytest -q -p no:cacheprovider $tests -k "not compile"
  # shellcheck disable=SC2086
  note compiled "$python" -m pytest -q -p no:cacheprovider $tests -k compile
  if [ -e "$work/oldest" ]; then
    # The stable ABI's promise: libraries of the oldest torch under this one.
    cp "$work"/oldest/_C_*.so fastdiff/
    # shellcheck disable=SC2086
    note "libraries of the first" "$python" -m pytest -q -p no:cacheprovider $tests
  else
    mkdir "$work/oldest"
    cp fastdiff/_C_*.so "$work/oldest/"
  fi
  table+=("$row  (torch $found, Triton $triton)")
  rm -rf "$work/venv"
done

printf '\n'
printf '%s\n' "${table[@]}"
exit "$failed"
