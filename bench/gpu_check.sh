#!/usr/bin/env bash
# All that needs a GPU, in one call of under 9 minutes and without a network:
#   bench/gpu_check.sh         builds the extension, tries every plan on small layers, runs the tests and
#                              compute-sanitizer, times the grid against cuDNN; a plan that crashes or hangs in the
#                              trial is left out
#   bench/gpu_check.sh peers   only times torch.nn in the grid, with cuDNN and without: nothing is built
#   bench/gpu_check.sh variants [TEXT...]   times what bench/gpu_variants.py builds in several ways
# Everything goes to one folder ($OUT, else build/gpu_check), the stages' logs in logs.tar.gz. A stage that fails or runs
# out of time leaves its log and what it had, and the others go on. The last lines say what became of each; the exit
# status is 1 if one failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OUT=${OUT:-$PWD/build/gpu_check} PYTHON=${PYTHON:-python3} PATH=$PATH:/usr/local/cuda/bin
total=530 # seconds

# sanitizer SECONDS: the three tools at the same time, each for so long; the plans with most to check first.
sanitizer() {
  local tool log code failed=0 tools=(memcheck racecheck synccheck) pids=() summary=()
  local options=(--kernel-name kernel_substring=fusedrnn --report-api-errors no --error-exitcode 9)
  log=$(mktemp -d)
  for tool in "${tools[@]}"; do
    timeout --kill-after 5 "$1" env OMP_NUM_THREADS=1 compute-sanitizer --tool "$tool" "${options[@]}" \
      "$PYTHON" -m bench.gpu_small cluster split grid loop stepwise > "$log/$tool" 2>&1 &
    pids+=($!)
  done
  for tool in "${tools[@]}"; do
    code=0
    wait "${pids[0]}" || code=$? failed=1
    pids=("${pids[@]:1}")
    summary+=("$tool: exit status $code: $(tail -n 1 "$log/$tool")")
    printf '== %s\n' "$tool"
    head -c 4000000 "$log/$tool"
  done
  rm -r "$log"
  printf '%s\n' '== all' "${summary[@]}"
  exit $failed
}
[[ ${1:-} != sanitizer ]] || sanitizer "$2"

# at_most SECONDS RESERVE: these seconds, or what is left of the total without the reserve for later stages.
at_most() {
  local left=$((total - SECONDS - $2))
  echo $((left < 10 ? 10 : left < $1 ? left : $1))
}

report() { printf '%-9s %s\n' "$1" "$2" | tee -a "$OUT/summary.txt"; }

finish() { # with few files, as some places return only so many
  tar -C "$OUT" -czf "$OUT/logs.tar.gz" --remove-files $(cd "$OUT" && ls -- *.log)
  printf '\n== %s\n' "$OUT"
  cat "$OUT/summary.txt"
  ! grep -q FAILED "$OUT/summary.txt"
  exit
}

# stage NAME SECONDS COMMAND...: its output goes to NAME.log, and the end of it here. At the limit it is interrupted, so
# that it can still say what it has found, and killed if that takes long.
stage() {
  local name=$1 seconds=$2 start=$SECONDS code=0
  shift 2
  timeout --signal INT --kill-after 10 "$seconds" "$@" > "$OUT/$name.log" 2>&1 < /dev/null || code=$?
  printf '\n== %s\n%s\n' "$name" "$(tail -n 12 "$OUT/$name.log" | cut -c 1-200)"
  case $code in
    0) report "$name" "passed, $((SECONDS - start)) s" ;;
    124 | 137) report "$name" "FAILED: stopped after $seconds s" ;;
    *) report "$name" "FAILED: exit status $code, $((SECONDS - start)) s" ;;
  esac
  return $code
}

# times SECONDS OPTIONS...: the grid. `python -m bench show` makes pictures and a CSV of results.json again.
times() {
  stage bench "$1" "$PYTHON" -m bench --device cuda --budget 0.5 --no-first-use --targets --out "$OUT/bench" \
    "${fastest[@]}" --limit $(($1 < 40 ? 10 : $1 - 30)) "${@:2}"
  rm -f "$OUT"/bench/*.png "$OUT"/bench/*.csv "$OUT"/bench/*.md
}

# Each plan in a process of its own, so that a kernel that hangs or spoils the device shows here. What follows uses the
# fastest plan such that neither it nor a slower one did so; fastest is empty if none did. Wrong numbers (exit status 3)
# keep no plan from being looked at: the tests show where they are, and the benchmark times no wrong result.
fastest=()
try_plans() {
  local plan plans=(stepwise loop grid cluster split)
  for plan in "${plans[@]}"; do
    stage "$plan" "$1" env OMP_NUM_THREADS=4 "$PYTHON" -m bench.gpu_small --large "$plan" > "$OUT/$plan.end" &
  done
  wait
  cat "$OUT"/*.end && rm "$OUT"/*.end
  fastest=(--plan stepwise)
  for plan in "${plans[@]}"; do
    grep -Eq "^$plan *(passed|FAILED: exit status 3,)" "$OUT/summary.txt" || return
    fastest=(--plan "$plan")
  done
  fastest=()
}

mkdir -p "$OUT"
rm -rf "$OUT"/summary.txt "$OUT"/*.log "$OUT"/logs.tar.gz "$OUT"/bench
nvidia-smi || true
capability='import torch; print("%d.%d" % torch.cuda.get_device_capability())'
if ! capability=$("$PYTHON" -c "$capability" 2> "$OUT/gpu.log"); then
  report gpu "FAILED: $(tail -n 1 "$OUT/gpu.log")"
  finish
fi
[[ $capability != 9.* ]] || capability+=a
export TORCH_CUDA_ARCH_LIST=$capability FUSEDRNN_CUDA=1
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

if [[ ${1:-} == peers ]]; then
  times "$(at_most 300 15)" --peers-only
  finish
fi
if [[ ${1:-} == variants ]]; then
  stage variants "$(at_most 520 5)" "$PYTHON" -m bench.gpu_variants --out "$OUT/variants.json" "${@:2}"
  cat "$OUT/variants.log"
  finish
fi
if ! stage build "$(at_most 240 250)" "$PYTHON" setup.py -q build_ext --inplace; then
  times "$(at_most 300 15)" --peers-only
  finish
fi

try_plans 90

# Many processes with one thread each. A test that hangs is given up alone, where pytest has the plugins for it.
export TORCHINDUCTOR_COMPILE_THREADS=1
tests=(env OMP_NUM_THREADS=1 "$PYTHON" -m pytest -v -rfE --tb short --device cuda --maxfail 100 "${fastest[@]}")
tests+=(--continue-on-collection-errors)
! "$PYTHON" -c 'import xdist' 2> /dev/null || tests+=(-n 8)
! "$PYTHON" -c 'import pytest_timeout' 2> /dev/null || tests+=(--timeout 60 --timeout-method thread)
kernels=(tests/test_cuda.py tests/test_stack.py tests/test_ops.py tests/test_ops_edges.py)
elsewhere=("${kernels[@]}" tests/test_packaging.py tests/test_docs.py tests/test_examples.py)

stage kernels "$(at_most 130 210)" "${tests[@]}" "${kernels[@]}"
times "$(at_most 200 80)" --without 'fusedrnn recompute'
seconds=$(at_most 200 15)
stage sanitizer "$seconds" bash bench/gpu_check.sh sanitizer $((seconds - 5)) &
stage tests "$seconds" "${tests[@]}" "${elsewhere[@]/#/--ignore=}"
wait
finish
