// What a Vec without masks makes of its own loads and stores: tails through a buffer, transposed blocks row by row.
// Included at the end of a simd_*.h.
#pragma once
#include "scalar.h"

namespace {

// The first n <= kWidth elements; the rest of the vector is zero, the rest of memory untouched.
template <typename T>
inline Vec vec_load_n(const T* p, int n) {
  T padded[kWidth] = {};
  for (int i = 0; i < n; ++i) padded[i] = p[i];
  return vec_load(padded);
}

template <typename T>
inline void vec_store_n(T* p, Vec a, int n) {
  T full[kWidth];
  vec_store(full, a);
  for (int i = 0; i < n; ++i) p[i] = full[i];
}

// A block of kWidth rows by `depth` <= kWidth columns, transposed to float32: columns[k] holds column k of all rows.
// Unless kFull, rows from `live` on count as zero, and nothing beyond depth is read.
template <bool kFull, typename T>
ALWAYS_INLINE void load_block(const T* rows, int64_t stride, int live, int depth, Vec* columns) {
  for (int i = 0; i < kWidth; ++i) {
    const T* row = rows + i * stride;
    columns[i] = kFull ? vec_load(row) : i < live ? vec_load_n(row, depth) : vec_zero();
  }
  vec_transpose(columns);
}

}  // namespace
