#!/usr/bin/env bash
# What a GPU is needed for, on a bare machine: torch, nvcc, cmake, ninja and a compiler, no network.
#   benchmarks/gpu.sh [build] [test] [sanitize] [bench]    (all of them by default)
# Each part has a time limit and a log under $OUT (build/gpu by default); one that fails does not stop the next, and the
# exit status is that of the worst. Python packages that the machine lacks are taken from .gpu/site, if that is there.
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
out=${OUT:-build/gpu}
mkdir -p "$out"
export PATH="$PATH:/usr/local/cuda/bin"
export PYTHONPATH="$PWD/.gpu/site:$PWD"

build() {
  local capability
  capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d .)
  [ "$capability" = 90 ] && capability=90a
  cmake -S csrc -B build/gpu -G Ninja -DCMAKE_BUILD_TYPE=Release -DENTRENAR_CUDA=ON \
    -DCMAKE_CUDA_ARCHITECTURES="$capability-real" -DPython3_EXECUTABLE="$(command -v "$python")" &&
    cmake --build build/gpu --parallel 16 &&
    cmake --install build/gpu --component entrenar --prefix .
}

# What reaches a kernel, or a product of torch's that the package arranges. The rest has nothing to do with devices, or
# takes its inputs from torch's tables for the CPU. Warnings are those of other versions of packages.
gpu_tests() {
  printf 'tests/autograd/test_%s.py\n' add_rms_norm attention cross_entropy_kernel decoder_block embedding int4 int4_linear \
    int4_lora_linears linear_cross_entropy loss_ops masked_attention matmul norm ops packed_attention \
    pointwise_kernels rotary single_queries swiglu swiglu_int4_lora_linear
  printf 'tests/%s\n' cuda/test_assertion.py cuda/test_determinism.py cuda/test_few_rows.py cuda/test_not_compiled.py \
    cuda/test_product_sm90.py fusion lora/test_layers.py lora/test_wrap.py optim/test_adamw.py \
    optim/test_clip.py optim/test_codes.py optim/test_fused_clip.py optim/test_rules.py optim/test_states.py \
    training/test_autocast.py training/test_data_parallel.py training/test_gpu.py
}

test_() {
  local workers=()
  "$python" -c 'import xdist' 2>/dev/null && workers=(-n 12)
  # shellcheck disable=SC2046  # names without spaces
  OMP_NUM_THREADS=1 "$python" -m pytest -q -W default --device cuda "${workers[@]}" --junitxml="$out/test.xml" \
    $(gpu_tests)
}

# Only the package's own kernels (by a part of their mangled names): torch's would take minutes. Each tensor has memory
# of its own, so that what lies beside it is not another's. The tools run side by side, each with a log of its own.
sanitize() {
  local tool pid pids=() status=0
  for tool in memcheck racecheck synccheck; do
    sanitize_by "$tool" >"$out/sanitize.$tool.log" 2>&1 &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do
    wait "$pid" || status=$?
  done
  tail -n 15 "$out"/sanitize.*.log
  return "$status"
}

# On an H200 racecheck ended with a hardware exception in a product of cuBLAS, where memcheck and synccheck saw nothing:
# it gets what calls none, and the products of few rows that are single blocks'. Hopper's own product it could not judge:
# its warps wait for each other at barriers in memory.
sanitize_by() {
  local parts=()
  [ "$1" = racecheck ] &&
    parts=(call_cases call_few_rows call_pointwise_kernels call_losses_in_place call_optimizers)
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout "$(($(seconds sanitize) - 10))" compute-sanitizer --tool "$1" \
    --kernel-name kns=entrenar --error-exitcode 1 "$python" tests/cuda/sanitize.py "${parts[@]}"
}

bench() {
  local status=0
  "$python" -m benchmarks.cuda || status=$?
  if [ "$out" != build/gpu ]; then cp -r benchmarks/results/cuda "$out"; fi
  return "$status"
}

seconds() {
  case $1 in
    build) echo 180 ;;
    test) echo 240 ;;
    sanitize) echo 120 ;;
    bench) echo 240 ;;
  esac
}

if [ "${1:-}" = --part ]; then  # within its time limit
  part=$2
  [ "$part" = test ] && part=test_
  "$part"
  exit
fi

worst=0
for part in "${@:-build test sanitize bench}"; do
  for name in $part; do
    if [ -z "$(seconds "$name")" ]; then
      echo "gpu.sh: no part '$name': build, test, sanitize or bench" >&2
      exit 2
    fi
    echo "== $name"
    start=$SECONDS
    timeout -k 5 "$(seconds "$name")" "$0" --part "$name" 2>&1 | tee "$out/$name.log"
    status=${PIPESTATUS[0]}
    echo "== $name: status $status after $((SECONDS - start)) s"
    if [ "$status" -gt "$worst" ]; then worst=$status; fi
  done
done
exit "$worst"
