#!/usr/bin/env bash
# All that needs a GPU, in one call of under 9 minutes and without a network: builds the extension here, runs the tests
# and compute-sanitizer, and times the grid against cuDNN. Results go to one folder ($OUT, else build/gpu_check).
# The steps go on after one that fails; the last line says which did.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${OUT:-build/gpu_check}
python=${PYTHON:-python3}
mkdir -p "$out"
failed=()

# step NAME SECONDS COMMAND...: its output goes to NAME.log, and its last lines here.
step() {
  local name=$1 seconds=$2 start=$SECONDS
  shift 2
  timeout "$seconds" "$@" > "$out/$name.log" 2>&1
  local code=$?
  ((code == 0)) || failed+=("$name ($code)")
  printf '\n== %s: exit %d, %d s\n' "$name" "$code" $((SECONDS - start))
  tail -n 12 "$out/$name.log"
}

sanitize() {
  local tool pids=()
  for tool in memcheck racecheck synccheck; do
    compute-sanitizer --tool "$tool" --error-exitcode 9 --kernel-name kernel_substring=fusedrnn \
      "$python" -m bench.gpu_small > "$out/sanitize-$tool.txt" 2>&1 &
    pids+=($!)
  done
  local code=0
  for pid in "${pids[@]}"; do wait "$pid" || code=1; done
  tail -n 3 "$out"/sanitize-*.txt
  rm -f "$out"/sanitize-*.txt
  return $code
}

export PYTHONUNBUFFERED=1 FUSEDRNN_CUDA=1
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$("$python" -c \
  'import torch; major, minor = torch.cuda.get_device_capability(); print(f"{major}.{minor}" + "a" * (major == 9))')}

step build 120 "$python" setup.py -q build_ext --inplace
step tests 200 "$python" -m pytest -q -n 8 --device cuda --maxfail 100 \
  --ignore tests/test_packaging.py --ignore tests/test_docs.py --ignore tests/test_examples.py
export -f sanitize
export out python
step sanitizer 90 bash -c sanitize
step bench 180 "$python" -m bench --device cuda --budget 0.5 --no-first-use --limit 140 --out "$out/bench"
rm -f "$out"/bench/*.png
printf '\nfailed: %s\n' "${failed[*]:-none}"
((${#failed[@]} == 0))
