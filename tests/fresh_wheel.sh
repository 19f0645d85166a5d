#!/usr/bin/env bash
# A wheel as users get it: installed into fresh environments whose PATH has no compiler, under the
# newest torch and under a CPU build, then verified there. Fails if a command does.
#
#   tests/fresh_wheel.sh dist/fastdiff-*.whl
set -euo pipefail
wheel=$(realpath "$1")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

for torch in torch "torch==2.13.0"; do
  printf '\n== %s with %s\n' "$(basename "$wheel")" "$torch"
  python3 -m venv "$work/venv"
  python="$work/venv/bin/python"
  "$python" -m pip install --quiet "$torch" numpy
  start=$SECONDS
  env PATH="$work/venv/bin" CXX= CUDA_HOME= "$python" -m pip install --quiet "$wheel"
  printf 'installed in %ss\n' $((SECONDS - start))
  cd "$work"
  env PATH="$work/venv/bin" "$python" -m fastdiff.info
  env PATH="$work/venv/bin" "$python" -m fastdiff.verify | tail -1
  cd - > /dev/null
  rm -rf "$work/venv"
done
