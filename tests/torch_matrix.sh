#!/usr/bin/env bash
# Every torch that fastdiff promises to run with, with the Triton that it brings: the CPU library
# and the calls in C++ built with it and run, eager, compiled and exported, and the libraries of the
# first one run under each of the others. Then every Triton under the last torch, in the interpreter
# and the emulator. Prints a table; fails if a cell does. The GPU suite (`pytest -m gpu`) runs with
# one torch only; what depends on torch's version is in the calls and the graphs, which run here.
#
#   tests/torch_matrix.sh                 # 2.10 to 2.14, one after the other: 6 GB of disk at a time
#   tests/torch_matrix.sh 2.11 2.14
#   TORCH_MATRIX_TRITONS="3.4 3.5" tests/torch_matrix.sh 2.10
#
# A torch takes the time of its download and about ten minutes.
set -uo pipefail
cd "$(dirname "$0")/.."

versions=("$@")
[ ${#versions[@]} -gt 0 ] || versions=(2.10 2.11 2.12 2.13 2.14)
read -ra tritons <<< "${TORCH_MATRIX_TRITONS-3.4 3.5 3.6 3.7}"

ops=tests/ops
# What a call passes through before it reaches a kernel, which one torch may do otherwise than another.
calls="$ops/test_dispatch.py $ops/test_not_tensors.py $ops/test_operand_dtypes.py
  $ops/test_flexible_layouts.py $ops/test_empty_samples.py $ops/test_eps_loss_with_gradient.py
  $ops/test_group_norm_silu_nodes.py $ops/test_transforms.py $ops/test_tracers.py
  tests/test_out_of_memory.py tests/test_backend_contexts.py tests/test_backends.py
  tests/nn/test_unet.py tests/integrations/test_transforms.py tests/integrations/test_patch_owners.py"
# Without what nvcc would compile for the emulator, which has nothing of torch in it.
not_cuda="not ptx and not traffic"
graphs="$ops tests/nn/test_unet.py tests/test_losses.py tests/test_gaussian.py tests/test_backends.py
  tests/test_backend_contexts.py tests/test_build.py tests/integrations/test_compile_pass.py
  tests/integrations/test_patch.py tests/integrations/test_patch_owners.py
  tests/integrations/test_patch_recognition.py"
exports=tests/integrations/test_patch_exports.py
triton_tests="$ops/test_group_norm_silu_triton.py $ops/test_triton_launch.py $ops/test_q_sample.py
  $ops/test_ddpm_step.py $ops/test_eps_loss.py $ops/test_philox_normal.py"

# Triton's interpreter takes the ends of loops from arrays of one number, which NumPy 2.4 refuses;
# Triton 3.7, which comes with torch 2.12, no longer does so.
numpy_for() { case $1 in 2.10 | 2.11 | 3.4 | 3.5 | 3.6) echo "numpy<2.4" ;; *) echo numpy ;; esac; }

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# A copy: builds in place of several torches would replace the libraries of this checkout.
mkdir "$work/source"
git ls-files -z | xargs -0 tar c | tar x -C "$work/source"
cd "$work/source" || exit 1

table=()
failed=0
# note NAME COMMAND...: runs it, with its output in a file that is shown if it fails
note() {
  local name=$1 log="$work/log" start=$SECONDS
  shift
  if "$@" > "$log" 2>&1; then
    row+="  $name: ok"
  else
    row+="  $name: FAILED"
    failed=1
    printf '\n== %s, %s\n' "$(head -c 7 <<< "$row")" "$name"
    tail -60 "$log"
  fi
  printf '%s: %ss; %s\n' "$name" $((SECONDS - start)) "$(tail -1 "$log")"
}
# run PATHS ARGUMENTS...: pytest, one path a word
run() {
  local paths=$1
  shift
  # shellcheck disable=SC2086
  "$work/venv/bin/python" -m pytest -q -p no:cacheprovider --timeout=600 $paths "$@"
}

for version in "${versions[@]}"; do
  printf '\n== torch %s (%ss)\n' "$version" "$SECONDS"
  row=$(printf '%-6s' "$version")
  rm -rf "$work/venv"
  python3 -m venv "$work/venv"
  python="$work/venv/bin/python"
  export PATH="$work/venv/bin:$PATH"
  note install "$python" -m pip install --quiet --no-compile "torch==$version.*" \
    "setuptools>=77" ninja "$(numpy_for "$version")"
  note build env FASTDIFF_BUILD=cpu "$python" -m pip install --quiet --no-build-isolation \
    -e ".[test]" "$(numpy_for "$version")"
  found=$("$python" -c "import torch; print(torch.__version__)" 2>&1 | tail -1)
  triton=$("$python" -c "import triton; print(triton.__version__)" 2>/dev/null || echo none)
  case $found in "$version".*) ;; *) row+="  torch: FAILED ($found)"; failed=1 ;; esac
  note "calls in C++" "$python" -c "from fastdiff import _native; assert _native.dispatch()[1] == 'C++'"
  note calls run "$calls" -k "not compile and $not_cuda"
  note fuzz env FASTDIFF_FUZZ_SECONDS=60 "$python" -m pytest -q -p no:cacheprovider -n 0 tests/fuzz/test_ops.py
  note compiled run "$graphs" -k "compile and $not_cuda"
  note exported run "$exports"
  if [ -e "$work/first" ]; then
    # The stable ABI's promise: libraries of the first torch under this one.
    cp "$work"/first/_C_*.so fastdiff/
    note "libraries of ${versions[0]}" run "$calls $ops/test_philox_normal.py" \
      -k "not compile and not not_tensors and $not_cuda"
  else
    mkdir "$work/first"
    cp fastdiff/_C_*.so "$work/first/"
  fi
  if [ "$triton" != none ]; then
    note "Triton $triton" run "$triton_tests" -k "triton and not cuda"
  fi
  table+=("$row  (torch $found)")
done
for version in "${tritons[@]}"; do
  printf '\n== Triton %s (%ss)\n' "$version" "$SECONDS"
  row="Triton $version"
  note install "$python" -m pip install --quiet --no-deps "triton==$version.*" "$(numpy_for "$version")"
  note tests run "$triton_tests" -k "triton and not cuda"
  table+=("$row  (torch $found)")
done

printf '\n'
printf '%s\n' "${table[@]}"
exit "$failed"
