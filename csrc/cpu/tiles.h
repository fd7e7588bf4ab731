// The two micro-kernels that every LoRA op is made of. Included after one simd_*.h.
//   dot_tile    out[m][n]  = sum_d x[m][d] * w[n][d]        both operands contiguous along the sum
//   panel_tile  acc[m][..] = sum_k left[m][k] * panel[k][..]  the panel packed in float32, contiguous along the output
// Each output has one accumulator whose order of additions is the same for every tile shape: results are
// batch-invariant whatever tile a token lands in.
#pragma once
#include "../lorakern.h"

namespace {

using lorakern::Weight;

constexpr int kPanelColumns = kTileVecs * kWidth;
constexpr int64_t kDotBlock = 2048;  // elements summed before the partial sum is set aside: bounds the rounding error

template <int M, int N>
struct Shape {};

template <typename T, int M, int N>
void dot_tile(Shape<M, N>, const T* const* x, const T* w, int64_t w_stride, int64_t d, float* const* out) {
  using D = Dot<T>;
  Vec total[M][N];
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) total[m][n] = vec_zero();
  for (int64_t begin = 0; begin < d; begin += kDotBlock) {
    const int64_t end = begin + kDotBlock < d ? begin + kDotBlock : d;
    Vec acc[M][N];
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) acc[m][n] = vec_zero();
    int64_t i = begin;
    for (; i + D::kStep <= end; i += D::kStep) {
      typename D::Operand b[N];
      for (int n = 0; n < N; ++n) b[n] = D::load(w + n * w_stride + i);
      for (int m = 0; m < M; ++m) {
        const typename D::Operand a = D::load(x[m] + i);
        for (int n = 0; n < N; ++n) acc[m][n] = D::step(a, b[n], acc[m][n]);
      }
    }
    if (i < end) {
      const int tail = static_cast<int>(end - i);
      for (int m = 0; m < M; ++m) {
        const typename D::Operand a = D::load_n(x[m] + i, tail);
        for (int n = 0; n < N; ++n) acc[m][n] = D::step(a, D::load_n(w + n * w_stride + i, tail), acc[m][n]);
      }
    }
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) total[m][n] = vec_add(total[m][n], acc[m][n]);
  }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) out[m][n] = vec_sum(total[m][n]);
}

template <int M>
void panel_tile(const float* const* left, const float* panel, int64_t k_size, Vec (*acc)[kTileVecs]) {
  Vec sum[M][kTileVecs];
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < kTileVecs; ++v) sum[m][v] = vec_zero();
  for (int64_t k = 0; k < k_size; ++k) {
    Vec b[kTileVecs];
    for (int v = 0; v < kTileVecs; ++v) b[v] = vec_load(panel + k * kPanelColumns + v * kWidth);
    for (int m = 0; m < M; ++m) {
      const Vec a = vec_set(left[m][k]);
      for (int v = 0; v < kTileVecs; ++v) sum[m][v] = vec_fma(a, b[v], sum[m][v]);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < kTileVecs; ++v) acc[m][v] = sum[m][v];
}

// panel_tile for the last m <= kTileTokens rows.
inline void panel_tiles(int m, const float* const* left, const float* panel, int64_t k_size, Vec (*acc)[kTileVecs]) {
  switch (m) {
    case 1:
      return panel_tile<1>(left, panel, k_size, acc);
    case 2:
      return panel_tile<2>(left, panel, k_size, acc);
    case 3:
      return panel_tile < kTileTokens<3 ? kTileTokens : 3>(left, panel, k_size, acc);
    default:
      return panel_tile<kTileTokens>(left, panel, k_size, acc);
  }
}

template <typename T, int M>
void dot_rows(int n, const T* const* x, const T* w, int64_t w_stride, int64_t d, float* const* out) {
  switch (n) {
    case 1:
      return dot_tile(Shape<M, 1>(), x, w, w_stride, d, out);
    case 2:
      return dot_tile(Shape<M, 2>(), x, w, w_stride, d, out);
    case 3:
      return dot_tile(Shape < M, kTileRows<3 ? kTileRows : 3>(), x, w, w_stride, d, out);
    default:
      return dot_tile(Shape<M, kTileRows>(), x, w, w_stride, d, out);
  }
}

// dot_tile for the last m <= kTileTokens tokens and n <= kTileRows rows.
template <typename T>
void dot_tiles(int m, int n, const T* const* x, const T* w, int64_t w_stride, int64_t d, float* const* out) {
  switch (m) {
    case 1:
      return dot_rows<T, 1>(n, x, w, w_stride, d, out);
    case 2:
      return dot_rows<T, 2>(n, x, w, w_stride, d, out);
    case 3:
      return dot_rows < T, kTileTokens<3 ? kTileTokens : 3>(n, x, w, w_stride, d, out);
    default:
      return dot_rows<T, kTileTokens>(n, x, w, w_stride, d, out);
  }
}

// panel[k][c] = rows[k][c] for `columns` <= kPanelColumns, zero beyond; row(k) gives the address of a row.
template <typename T, typename Row>
void pack_rows(Row row, int64_t k_size, int64_t columns, float* panel) {
  for (int64_t k = 0; k < k_size; ++k) {
    const T* source = row(k);
    for (int v = 0; v < kTileVecs; ++v, panel += kWidth) {
      const int64_t left = columns - v * kWidth;
      vec_store(panel, left >= kWidth ? vec_load(source + v * kWidth)
                       : left > 0     ? vec_load_n(source + v * kWidth, static_cast<int>(left))
                                      : vec_zero());
    }
  }
}

// panel[k][c] = rows[c][k]: the same from a matrix whose rows run along k. Reads no element beyond k_size.
template <typename T>
void pack_columns(const T* rows, int64_t stride, int64_t k_size, int64_t columns, float* panel) {
  for (int v = 0; v < kTileVecs; ++v) {
    const int live = static_cast<int>(columns - v * kWidth);
    for (int64_t k = 0; k < k_size; k += kWidth) {
      const int depth = k_size - k < kWidth ? static_cast<int>(k_size - k) : kWidth;
      const T* block = rows + v * kWidth * stride + k;
      float* out = panel + k * kPanelColumns + v * kWidth;
      Vec column[kWidth];
      if (depth == kWidth && live >= kWidth)
        load_block<true>(block, stride, kWidth, kWidth, column);
      else
        load_block<false>(block, stride, live, depth, column);
      for (int i = 0; i < depth; ++i) vec_store(out + i * kPanelColumns, column[i]);
    }
  }
}

// What panel_tile computes from pack_columns, for kWidth columns and without the panel: for few tokens, where packing
// would cost more than the sums. The order of additions is the same.
template <bool kFull, int M, typename T>
ALWAYS_INLINE void direct_tile(const float* const* left, const T* rows, int64_t stride, int64_t k_size, int live,
                               Vec* acc) {
  for (int m = 0; m < M; ++m) acc[m] = vec_zero();
  int64_t k = 0;
  for (; k + kWidth <= k_size; k += kWidth) {
    Vec column[kWidth];
    load_block<kFull>(rows + k, stride, live, kWidth, column);
    for (int i = 0; i < kWidth; ++i)
      for (int m = 0; m < M; ++m) acc[m] = vec_fma(vec_set(left[m][k + i]), column[i], acc[m]);
  }
  if (k < k_size) {
    const int depth = static_cast<int>(k_size - k);
    Vec column[kWidth];
    load_block<false>(rows + k, stride, live, depth, column);
    for (int i = 0; i < depth; ++i)
      for (int m = 0; m < M; ++m) acc[m] = vec_fma(vec_set(left[m][k + i]), column[i], acc[m]);
  }
}

}  // namespace
