#!/bin/sh
# Compile every CUDA kernel for sm_80 and sm_90a without a GPU; print registers and shared memory, fail on a spill.
set -eu
cd "$(dirname "$0")"
report=$(mktemp)
trap 'rm -f "$report"' EXIT
for source in *.cu; do
  for arch in 80 90a; do
    echo "$source for sm_$arch"
    nvcc -O3 -std=c++17 -I . -gencode "arch=compute_$arch,code=sm_$arch" -Xptxas -v -cubin -o /dev/null "$source" > "$report" 2>&1 ||
      { cat "$report"; exit 1; }
    grep -E 'Compiling entry function|bytes spill|Used' "$report" | sed 's/^ptxas info *: *//'
    if grep -E '[1-9][0-9]* bytes spill' "$report" > /dev/null; then echo "a kernel spills"; exit 1; fi
  done
done
