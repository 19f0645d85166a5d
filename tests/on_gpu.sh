#!/usr/bin/env bash
# Everything that only a GPU can show, in stages of at most ten minutes, without a network.
#
#   tests/on_gpu.sh                          every stage
#   tests/on_gpu.sh build verify             some of them
#   OUT=results tests/on_gpu.sh suite        where the files go (default: gpu_results)
#
# Stages: build (for this GPU's architecture, with the torch that is there), verify, suite,
# sanitizer (compute-sanitizer on a sample of the suite), benchmarks. A stage that fails does not
# stop the next; the exit code is 1 if one failed. docs/gpu_owner.md says what they print.
set -uo pipefail
cd "$(dirname "$0")/.."

out=${OUT:-gpu_results}
limit=${STAGE_SECONDS:-570}
mkdir -p "$out"
out=$(cd "$out" && pwd)
failed=()
[ $# -gt 0 ] || set -- build verify suite sanitizer benchmarks

# Runs a command with the time limit; what it prints goes to the screen and to FILE.txt.
stage() {
  local name=$1 code
  shift
  printf '\n== %s: %s\n' "$name" "$*"
  timeout --signal=INT --kill-after=20 "$limit" "$@" 2>&1 | tee "$out/$name.txt"
  code=${PIPESTATUS[0]}
  [ "$code" = 0 ] || failed+=("$name (exit code $code)")
  printf '%s: exit code %s, %s s\n' "$name" "$code" "$SECONDS" >> "$out/summary.txt"
}

python - > "$out/machine.json" <<'PY' || { echo "no CUDA device is visible to torch, or no torch"; exit 2; }
import importlib.metadata, json, platform, torch
if not torch.cuda.is_available():
    raise SystemExit(2)
p = torch.cuda.get_device_properties(0)
def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
print(json.dumps({
    "device": p.name, "devices": torch.cuda.device_count(), "capability": [p.major, p.minor],
    "memory_gib": round(p.total_memory / 2**30, 1), "multiprocessors": p.multi_processor_count,
    "torch": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip,
    "triton": version("triton"), "python": platform.python_version(),
    "is_a_gpu": "software" not in p.name,
}, indent=1))
PY
cat "$out/machine.json"
git rev-parse HEAD > "$out/commit.txt" 2>/dev/null || true
command -v nvidia-smi > /dev/null && nvidia-smi > "$out/nvidia_smi.txt" 2>&1
: > "$out/summary.txt"
arch=$(python -c 'import json, sys; print("%d.%d" % tuple(json.load(open(sys.argv[1]))["capability"]))' "$out/machine.json")

# Without a network and build isolation the build takes what is installed here.
needs_build_tools() {
  python - <<'PY'
from importlib.metadata import PackageNotFoundError, version
least = {"setuptools": 77, "ninja": 1}
missing = []
for name, major in least.items():
    try:
        found = version(name)
    except PackageNotFoundError:
        found = "none"
    if found == "none" or int(found.split(".")[0]) < major:
        missing.append(f"{name} >= {major} (found {found})")
if missing:
    raise SystemExit("build: install these first, or skip the stage: " + ", ".join(missing))
PY
}

for name in "$@"; do
  SECONDS=0
  case $name in
    build)
      if ! needs_build_tools 2>&1 | tee -a "$out/summary.txt"; then
        failed+=("build (tools are missing)")
        continue
      fi
      TORCH_CUDA_ARCH_LIST=$arch stage build \
        python -m pip install --no-build-isolation --no-deps --no-index -v -e .
      python -m fastdiff.info > "$out/info.txt" 2>&1
      ;;
    verify)
      stage verify python -m fastdiff.verify --device cuda
      ;;
    suite)
      stage suite python -m pytest -m "gpu and not slow" -q --durations=20 \
        --junitxml="$out/suite.xml"
      ;;
    sanitizer)
      if command -v compute-sanitizer > /dev/null; then
        stage sanitizer compute-sanitizer --tool memcheck --error-exitcode 9 \
          --target-processes all python -m pytest -n 0 -q -x -m "gpu and not slow" \
          tests/gpu/test_group_norm_silu_plans.py
      else
        echo "sanitizer: no compute-sanitizer on the PATH: not run" | tee -a "$out/summary.txt"
      fi
      ;;
    benchmarks)
      # Times of a device in software mean nothing; a few shapes show that the command runs.
      few=()
      grep -q '"is_a_gpu": false' "$out/machine.json" && few=(--shapes digits --rounds 1)
      stage benchmarks python -m benchmarks --device cuda --quick "${few[@]}" \
        --out "$out/benchmarks"
      ;;
    *)
      echo "no stage $name: build, verify, suite, sanitizer, benchmarks"
      exit 2
      ;;
  esac
done

printf '\n== results in %s\n' "$out"
cat "$out/summary.txt"
if [ ${#failed[@]} -gt 0 ]; then printf 'FAILED: %s\n' "${failed[@]}"; exit 1; fi
