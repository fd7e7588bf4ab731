#!/bin/sh
# Compile every CUDA kernel for sm_80 and sm_90a without a GPU; print registers, spills and shared memory. A compiler
# error or a spill fails it.
set -eu
cd "$(dirname "$0")"
reports=$(mktemp -d)
trap 'rm -rf "$reports"' EXIT

compile() {  # source, architecture
  nvcc -O3 -std=c++17 -I . -gencode "arch=compute_$2,code=sm_$2" -Xptxas -v -cubin -o /dev/null "$1" > "$reports/$2" 2>&1
}

for source in *.cu; do
  compile "$source" 80 & other=$!
  compile "$source" 90a || { cat "$reports/90a"; exit 1; }
  wait "$other" || { cat "$reports/80"; exit 1; }
  for arch in 80 90a; do
    echo "$source for sm_$arch"
    grep -E 'Compiling entry function|bytes spill|Used' "$reports/$arch" | sed 's/^ptxas info *: *//'
    if grep -E '[1-9][0-9]* bytes (stack frame|spill)' "$reports/$arch" > /dev/null; then echo "a kernel spills"; exit 1; fi
  done
done
