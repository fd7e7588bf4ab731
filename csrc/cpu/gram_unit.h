// Gram matrices as units of work: rows of any dtype and strides are packed as float64, a column of all rows after the
// other, and multiplied there. The product of two float32 is exact in float64, so only the sums round.
#pragma once
#include <algorithm>

#include "variant.h"

namespace {

using lorakern::Dtype;
using lorakern::GramUnit;
using lorakern::RowSet;

constexpr int64_t kGramDepth = 128;  // columns packed, and summed in registers, at a time

inline int64_t gram_width(int64_t rows) { return (rows + kWidth - 1) / kWidth * kWidth; }

// A packed column is longer than the rows: whole vectors are stored wherever a set ends.
inline int64_t gram_stride(int64_t rows) { return gram_width(rows) + kWidth; }

inline int64_t gram_scratch(int64_t rows) { return gram_stride(rows) * kGramDepth; }

inline double to_double(double value) { return value; }
template <typename T>
double to_double(T value) {
  return to_float(value);
}

// Columns begin .. begin + depth of a set, each `stride` doubles after the one before it.
template <typename T>
void gram_pack(const RowSet& set, int64_t begin, int64_t depth, double* out, int64_t stride) {
  const T* data = static_cast<const T*>(set.data) + begin * set.column_stride;
  if constexpr (sizeof(T) < 8) {
    if (set.row_stride == 1) {
      for (int64_t k = 0; k < depth; ++k)
        for (int64_t r = 0; r < set.rows; r += kWidth) {
          const T* from = data + k * set.column_stride + r;
          const int64_t live = set.rows - r;
          vec_widen(out + k * stride + r, live >= kWidth ? vec_load(from) : vec_load_n(from, static_cast<int>(live)));
        }
      return;
    }
    if (set.column_stride == 1) {
      for (int64_t r = 0; r < set.rows; r += kWidth)
        for (int64_t k = 0; k < depth; k += kWidth) {
          const T* from = data + r * set.row_stride + k;
          const int live = static_cast<int>(std::min<int64_t>(set.rows - r, kWidth)),
                    some = static_cast<int>(std::min<int64_t>(depth - k, kWidth));
          Vec columns[kWidth];
          if (live == kWidth && some == kWidth)
            load_block<true>(from, set.row_stride, live, some, columns);
          else
            load_block<false>(from, set.row_stride, live, some, columns);
          for (int i = 0; i < some; ++i) vec_widen(out + (k + i) * stride + r, columns[i]);
        }
      return;
    }
  }
  for (int64_t r = 0; r < set.rows; ++r)
    for (int64_t k = 0; k < depth; ++k)
      out[k * stride + r] = to_double(data[r * set.row_stride + k * set.column_stride]);
}

inline void gram_pack_any(const RowSet& set, int64_t begin, int64_t depth, double* out, int64_t stride) {
  switch (set.dtype) {
    case Dtype::kFloat32:
      return gram_pack<float>(set, begin, depth, out, stride);
    case Dtype::kFloat16:
      return gram_pack<f16>(set, begin, depth, out, stride);
    case Dtype::kBFloat16:
      return gram_pack<bf16>(set, begin, depth, out, stride);
    case Dtype::kFloat64:
      return gram_pack<double>(set, begin, depth, out, stride);
  }
}

// out[i][j] += sum over the packed columns of left[i] * right[j], for kWideRows rows and kWidth columns.
ALWAYS_INLINE void gram_tile(const double* left, const double* right, int64_t depth, int64_t stride, double* out,
                             int64_t width) {
  constexpr int kHalf = kWidth / 2;
  Wide sums[kWideRows][2];
  for (auto& row : sums) row[0] = row[1] = wide_zero();
  for (int64_t k = 0; k < depth; ++k, left += stride, right += stride) {
    const Wide low = wide_load(right), high = wide_load(right + kHalf);
#pragma GCC unroll 8
    for (int i = 0; i < kWideRows; ++i) {
      const Wide factor = wide_set(left[i]);
      sums[i][0] = wide_fma(factor, low, sums[i][0]);
      sums[i][1] = wide_fma(factor, high, sums[i][1]);
    }
  }
  for (int i = 0; i < kWideRows; ++i)
    for (int h = 0; h < 2; ++h) {
      double* to = out + i * width + h * kHalf;
      wide_store(to, wide_add(wide_load(to), sums[i][h]));
    }
}

inline void gram(const GramUnit& u, double* scratch) {
  const int64_t rows = u.problem->rows, width = gram_width(rows), stride = gram_stride(rows);
  std::fill(u.out, u.out + width * width, 0.0);
  for (int64_t k = 0; k < kGramDepth; ++k) std::fill(scratch + k * stride + rows, scratch + (k + 1) * stride, 0.0);
  for (int64_t begin = u.column_begin; begin < u.column_end; begin += kGramDepth) {
    const int64_t depth = std::min(u.column_end - begin, kGramDepth);
    double* packed = scratch;
    // In ascending order: what a set's last vector stores beyond its rows is zero, or overwritten by the next set.
    for (int64_t s = 0; s < u.problem->num_sets; ++s) {
      gram_pack_any(u.problem->sets[s], begin, depth, packed, stride);
      packed += u.problem->sets[s].rows;
    }
    for (int64_t j = 0; j < width; j += kWidth)
      for (int64_t i = 0; i < j + kWidth; i += kWideRows)
        gram_tile(scratch + i, scratch + j, depth, stride, u.out + i * width + j, width);
  }
}

}  // namespace
