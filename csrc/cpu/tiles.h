// The two micro-kernels that every LoRA op is made of. Included after one simd_*.h.
//   dot_tile    out[m][n]   = sum_d x[m][d] * w[n][d]        both operands contiguous along the sum
//   panel_tile  sum[m][..]  = sum_k left[m][k] * panel[k][..] the panel packed in cells, contiguous along the output
// A token's sums are added in an order that depends on the length of the sum alone, never on the shape of the tile that
// computes them: results are batch-invariant whatever tile a token lands in.
#pragma once
#include <algorithm>
#include <type_traits>

#include "../lorakern.h"

namespace {

using lorakern::Weight;

constexpr int kTileRows = 4;
constexpr int kPanelColumns = kTileVecs * kWidth;
constexpr int64_t kDotBlock = 1024;  // elements of a dot product that stay in L1, and that are summed on their own

// Call f with the constant n, 1 <= n <= Max.
template <int Max, typename F>
ALWAYS_INLINE void with_constant(int n, const F& f) {
  if constexpr (Max == 1) {
    f(std::integral_constant<int, 1>());
  } else {
    if (n >= Max)
      f(std::integral_constant<int, Max>());
    else
      with_constant<Max - 1>(n, f);
  }
}

// out[m][n * step] (+)= the products of M rows of x with N rows of w over d <= kDotBlock elements.
template <typename T, int M, int N>
void dot_tile(const T* const* x, const T* w, int64_t w_stride, int64_t begin, int64_t d, float* const* out,
              int64_t step) {
  using D = Dot<T>;
  Vec acc[M][kTileRows];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < kTileRows; ++n) acc[m][n] = vec_zero();
  const T *a[M], *b[N];
  for (int m = 0; m < M; ++m) a[m] = x[m] + begin;
  for (int n = 0; n < N; ++n) b[n] = w + n * w_stride + begin;
  int64_t i = 0;
  for (; i + D::kStep <= d; i += D::kStep) {
    typename D::Operand right[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) right[n] = D::load(b[n] + i);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const typename D::Operand left = D::load(a[m] + i);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[m][n] = D::step(left, right[n], acc[m][n]);
    }
  }
  if (i < d) {
    const int tail = static_cast<int>(d - i);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const typename D::Operand left = D::load_n(a[m] + i, tail);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[m][n] = D::step(left, D::load_n(b[n] + i, tail), acc[m][n]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    float sums[kTileRows];
    vec_sum4(acc[m], sums);
    for (int n = 0; n < N; ++n) out[m][n * step] = begin == 0 ? sums[n] : out[m][n * step] + sums[n];
  }
}

// V vectors of the sums of M rows over `count` cells; finish(m, sums) takes each row. Cell k of row m is left[m][k *
// step].
template <typename T, int M, int V, typename Finish>
ALWAYS_INLINE void panel_tile(const typename Outer<T>::Cell* const* left, int64_t step,
                              const typename Outer<T>::Cell* panel, int64_t count, const Finish& finish) {
  using O = Outer<T>;
  Vec sum[M][V];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[m][v] = vec_zero();
  const typename O::Cell* a[M];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) a[m] = left[m];
  for (int64_t k = 0; k < count; ++k, panel += V * kWidth) {
    typename O::Operand right[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) right[v] = O::load(panel + v * kWidth);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[m][v] = O::step(a[m] + k * step, right[v], sum[m][v]);
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) finish(m, sum[m]);
}

// What panel_tile<M, 1> computes, from weight rows that run along the sum and without packing them: for few tokens,
// where packing would cost more than the sums. The order of additions is the same.
template <typename T, int M, bool kFull>
ALWAYS_INLINE void direct_tile(const typename Outer<T>::Cell* const* left, const T* rows, int64_t stride, int64_t depth,
                               int live, Vec* sum) {
  using O = Outer<T>;
  constexpr int kCells = kWidth / O::kPack;
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) sum[m] = vec_zero();
  int64_t k = 0;
  for (; k + kWidth <= depth; k += kWidth) {
    typename O::Operand cells[kCells];
    O::template load_block<kFull>(rows + k, stride, live, kWidth, cells);
    for (int i = 0; i < kCells; ++i)
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) sum[m] = O::step(left[m] + k / O::kPack + i, cells[i], sum[m]);
  }
  if (k < depth) {
    const int rest = static_cast<int>(depth - k);
    typename O::Operand cells[kCells];
    O::template load_block<false>(rows + k, stride, live, rest, cells);
    for (int i = 0; i * O::kPack < rest; ++i)
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) sum[m] = O::step(left[m] + k / O::kPack + i, cells[i], sum[m]);
  }
}

template <typename T>
constexpr int64_t cells_of(int64_t depth) {
  return (depth + Outer<T>::kPack - 1) / Outer<T>::kPack;
}

// The panel of V * kWidth columns from weight rows that run along the sum: panel[k][c] = cell k of row c.
template <typename T>
void pack_columns(const T* rows, int64_t stride, int64_t depth, int64_t columns, int vecs,
                  typename Outer<T>::Cell* panel) {
  using O = Outer<T>;
  for (int v = 0; v < vecs; ++v) {
    const int live = static_cast<int>(columns - v * kWidth);
    for (int64_t k = 0; k < depth; k += kWidth) {
      const int some = depth - k < kWidth ? static_cast<int>(depth - k) : kWidth;
      const T* block = rows + v * kWidth * stride + k;
      typename O::Cell* out = panel + (k / O::kPack * vecs + v) * kWidth;
      typename O::Operand cells[kWidth / O::kPack];
      if (some == kWidth && live >= kWidth)
        O::template load_block<true>(block, stride, kWidth, kWidth, cells);
      else
        O::template load_block<false>(block, stride, live, some, cells);
      for (int i = 0; i * O::kPack < some; ++i, out += vecs * kWidth) std::memcpy(out, &cells[i], sizeof(cells[i]));
    }
  }
}

// The panel from rows that run along the output: row(k) gives the address of the k-th of `depth` rows, of T or float.
template <typename T, typename Row>
void pack_rows(const Row& row, int64_t depth, int64_t columns, int vecs, typename Outer<T>::Cell* panel) {
  for (int64_t k = 0; k < depth; k += Outer<T>::kPack) {
    decltype(row(k)) rows[2] = {row(k), Outer<T>::kPack == 2 && k + 1 < depth ? row(k + 1) : nullptr};
    for (int v = 0; v < vecs; ++v, panel += kWidth) {
      const int64_t n = std::clamp<int64_t>(columns - v * kWidth, 0, kWidth);
      Outer<T>::pack_rows(rows, static_cast<int>(n), panel);
      rows[0] += n;
      if (rows[1]) rows[1] += n;
    }
  }
}

// Cells of a row of T: the row itself where it is one already, else converted into `scratch`.
template <typename T>
const typename Outer<T>::Cell* row_cells(const T* row, int64_t n, typename Outer<T>::Cell* scratch) {
  using O = Outer<T>;
  if constexpr (O::kDirect)
    if (n % O::kPack == 0) return reinterpret_cast<const typename O::Cell*>(row);
  if constexpr (O::kPack == 1) {
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) vec_store(scratch + i, vec_load(row + i));
    if (i < n) vec_store_n(scratch + i, vec_load_n(row + i, static_cast<int>(n - i)), static_cast<int>(n - i));
  } else {
    scratch[n / 2] = {};
    std::memcpy(scratch, row, n * sizeof(T));
  }
  return scratch;
}

}  // namespace
