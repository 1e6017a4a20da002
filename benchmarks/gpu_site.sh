#!/usr/bin/env bash
# Makes .gpu/site, the Python packages that a bare GPU machine lacks for benchmarks/gpu.sh, of the versions that are
# tested with; without what they depend on, and small enough to be carried there.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
site=.gpu/site
most=60  # MiB

mapfile -t packages < <(grep -oE '^(transformers|gguf|expecttest|peft|bitsandbytes)==[^ ]+' requirements.txt)
rm -rf "$site"
"$python" -m pip install --quiet --no-deps --no-compile --only-binary=:all: --target "$site" \
  "${packages[@]}" liger-kernel==0.8.5

# A library for each version of CUDA and its like: torch's is 13.0. What models are generated from is never imported.
find "$site/bitsandbytes" -name 'libbitsandbytes_*.so' ! -name libbitsandbytes_cuda130.so -delete
find "$site/transformers/models" -name 'modular_*.py' -delete

size=$(find "$site" -type f -printf '%s\n' | awk '{ sum += $1 } END { print int(sum / 2 ^ 20) + 1 }')
echo "$site: $size MiB"
if [ "$size" -gt "$most" ]; then
  echo "gpu_site.sh: more than $most MiB" >&2
  exit 1
fi
