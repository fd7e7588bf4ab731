// Gram matrices as units of work: rows of any dtype and strides are packed as float64, a column of all rows after the
// other, and multiplied there. The product of two float32 is exact in float64, so only the sums round.
#pragma once
#include <algorithm>
#include <limits>

#include "variant.h"

namespace {

using lorakern::ColumnUnit;
using lorakern::Dtype;
using lorakern::kProbes;
using lorakern::Rows;
using lorakern::RowSet;

constexpr int64_t kPackedColumns = 128;  // packed, and summed in registers, at a time

inline int64_t packed_width(int64_t rows) { return (rows + kWidth - 1) / kWidth * kWidth; }

// A packed column is longer than the rows: whole vectors are stored wherever a set ends.
inline int64_t packed_stride(int64_t rows) { return packed_width(rows) + kWidth; }

// The packed columns, what `lines` and `combine` multiply them by, and their sums for kWideRows columns.
inline int64_t packed_scratch(int64_t rows, int64_t results) {
  const int64_t factors = std::max(packed_stride(rows), rows * packed_width(results));
  return packed_stride(rows) * kPackedColumns + factors + kWideRows * std::max(lorakern::kProbes, kWidth);
}

inline double to_double(double value) { return value; }
template <typename T>
double to_double(T value) {
  return to_float(value);
}

inline void put(double* p, Vec a) {
  wide_store(p, wide_low(a));
  wide_store(p + kWidth / 2, wide_high(a));
}
inline void put(float* p, Vec a) { vec_store(p, a); }

// Columns begin .. begin + depth of a set, each `stride` numbers after the one before it.
template <typename T, typename Out>
void pack_set(const RowSet& set, int64_t begin, int64_t depth, Out* out, int64_t stride) {
  const T* data = static_cast<const T*>(set.data) + begin * set.column_stride;
  if constexpr (sizeof(T) < 8) {
    if (set.row_stride == 1) {
      for (int64_t k = 0; k < depth; ++k)
        for (int64_t r = 0; r < set.rows; r += kWidth) {
          const T* from = data + k * set.column_stride + r;
          const int64_t live = set.rows - r;
          put(out + k * stride + r, live >= kWidth ? vec_load(from) : vec_load_n(from, static_cast<int>(live)));
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
          // So many rows are more streams than the hardware follows: ask for the columns that are packed next.
          for (int i = 0; i < live; ++i) __builtin_prefetch(from + i * set.row_stride + kPackedColumns);
          if (live == kWidth && some == kWidth)
            load_block<true>(from, set.row_stride, live, some, columns);
          else
            load_block<false>(from, set.row_stride, live, some, columns);
          for (int i = 0; i < some; ++i) put(out + (k + i) * stride + r, columns[i]);
        }
      return;
    }
  }
  for (int64_t r = 0; r < set.rows; ++r)
    for (int64_t k = 0; k < depth; ++k)
      out[k * stride + r] = static_cast<Out>(to_double(data[r * set.row_stride + k * set.column_stride]));
}

template <typename Out>
void pack_any(const RowSet& set, int64_t begin, int64_t depth, Out* out, int64_t stride) {
  switch (set.dtype) {
    case Dtype::kFloat32:
      return pack_set<float>(set, begin, depth, out, stride);
    case Dtype::kFloat16:
      return pack_set<f16>(set, begin, depth, out, stride);
    case Dtype::kBFloat16:
      return pack_set<bf16>(set, begin, depth, out, stride);
    case Dtype::kFloat64:
      return pack_set<double>(set, begin, depth, out, stride);
  }
}

// Columns begin .. begin + depth of all sets, in ascending order of the sets: what a set's last vector stores beyond
// its rows is zero, or overwritten by the next set.
template <typename Out>
void pack(const Rows& x, int64_t begin, int64_t depth, Out* out, int64_t stride) {
  for (int64_t s = 0; s < x.num_sets; ++s) {
    pack_any(x.sets[s], begin, depth, out, stride);
    out += x.sets[s].rows;
  }
}

// What lies beyond the rows of a packed column takes part in sums of whole vectors.
template <typename Out>
void clear_padding(int64_t rows, Out* packed, int64_t stride) {
  for (int64_t k = 0; k < kPackedColumns; ++k) std::fill(packed + k * stride + rows, packed + (k + 1) * stride, Out());
}

struct Operand {
  const double* data;
  int64_t row, depth;  // strides
};

// out[i][j] += sum over `depth` of left[i] * right[j], for kWideRows rows i and kVecs vectors of neighbours j.
template <int kVecs>
ALWAYS_INLINE void wide_tile(Operand left, Operand right, int64_t depth, double* out, int64_t out_stride) {
  constexpr int kHalf = kWidth / 2;
  Wide sums[kWideRows][kVecs];
  for (auto& row : sums)
    for (Wide& sum : row) sum = wide_zero();
  for (int64_t k = 0; k < depth; ++k, left.data += left.depth, right.data += right.depth) {
    Wide values[kVecs];
    for (int v = 0; v < kVecs; ++v) values[v] = wide_load(right.data + v * kHalf);
#pragma GCC unroll 8
    for (int i = 0; i < kWideRows; ++i) {
      const Wide factor = wide_set(left.data[i * left.row]);
      for (int v = 0; v < kVecs; ++v) sums[i][v] = wide_fma(factor, values[v], sums[i][v]);
    }
  }
  for (int i = 0; i < kWideRows; ++i)
    for (int v = 0; v < kVecs; ++v) {
      double* to = out + i * out_stride + v * kHalf;
      wide_store(to, wide_add(wide_load(to), sums[i][v]));
    }
}

inline void gram(const ColumnUnit<lorakern::GramProblem>& u, double* packed) {
  const Rows& x = u.problem->x;
  const int64_t width = packed_width(x.rows), stride = packed_stride(x.rows);
  std::fill(u.out, u.out + width * width, 0.0);
  clear_padding(x.rows, packed, stride);
  for (int64_t begin = u.begin; begin < u.end; begin += kPackedColumns) {
    const int64_t depth = std::min(u.end - begin, kPackedColumns);
    pack(x, begin, depth, packed, stride);
    for (int64_t j = 0; j < width; j += kWidth)
      for (int64_t i = 0; i < j + kWidth; i += kWideRows)
        wide_tile<2>({packed + i, 1, stride}, {packed + j, 0, stride}, depth, u.out + i * width + j, width);
  }
}

inline void sketch(const ColumnUnit<lorakern::SketchProblem>& u, double* packed) {
  const Rows& x = u.problem->x;
  const int64_t width = packed_width(x.rows), stride = packed_stride(x.rows);
  double* norms = u.out + width * kProbes;
  std::fill(u.out, norms + width, 0.0);
  clear_padding(x.rows, packed, stride);
  for (int64_t begin = u.begin; begin < u.end; begin += kPackedColumns) {
    const int64_t depth = std::min(u.end - begin, kPackedColumns);
    const double* probes = u.problem->probes + begin * kProbes;
    pack(x, begin, depth, packed, stride);
    for (int64_t r = 0; r < width; r += kWidth)
      for (int i = 0; i < kProbes; i += kWideRows)
        wide_tile<2>({probes + i, 1, kProbes}, {packed + r, 0, stride}, depth, u.out + i * width + r, width);
    for (int64_t r = 0; r < width; r += kWidth / 2) {
      Wide sum = wide_load(norms + r);
      for (int64_t k = 0; k < depth; ++k) {
        const Wide value = wide_load(packed + k * stride + r);
        sum = wide_fma(value, value, sum);
      }
      wide_store(norms + r, sum);
    }
  }
}

inline double sum_of_squares(const double* values, int count) {
  double sum = 0;
  for (int i = 0; i < count; ++i) sum += values[i] * values[i];
  return sum;
}

// sum_r factors[r] * values[r]^2 over whole vectors.
inline double weighted_squares(const double* values, const double* factors, int64_t count) {
  constexpr int kHalf = kWidth / 2;
  Wide sum = wide_zero();
  for (int64_t r = 0; r < count; r += kHalf) {
    const Wide value = wide_load(values + r);
    sum = wide_fma(wide_fma(value, value, wide_zero()), wide_load(factors + r), sum);
  }
  double lanes[kHalf], total = 0;
  wide_store(lanes, sum);
  for (double lane : lanes) total += lane;
  return total;
}

// Is `value` neither within a quarter nor within a step of ratio * source? Never, for a ratio of NaN.
inline bool is_outlier(double source, double value, double ratio, double step) {
  const double wanted = ratio * source, off = value - wanted;
  return off * off > wanted * wanted / 16 + step * step;
}

inline int64_t outliers(const double* source, const double* values, const lorakern::LinesProblem& p) {
  int64_t count = 0;
  for (int64_t r = 0; r < p.first; ++r) count += is_outlier(source[r], values[r], p.ratios[r], p.step);
  return count;
}

inline void lines(const ColumnUnit<lorakern::LinesProblem>& u, double* packed) {
  const lorakern::LinesProblem& p = *u.problem;
  const int64_t stride = packed_stride(p.x.rows), last = p.x.rows - p.first;
  double *factors = packed + kPackedColumns * stride, *sums = factors + stride;
  std::fill(packed, factors, 0.0);
  std::fill(std::copy(p.factors + p.first, p.factors + p.x.rows, factors), factors + stride, 0.0);
  double whole = 0, part = 0, worst = 0, index = 0, where = 0;
  int64_t off = 0;
  for (int64_t begin = u.begin; begin < u.end; begin += kPackedColumns) {
    const int64_t depth = std::min(u.end - begin, kPackedColumns);
    pack(p.x, begin, depth, packed, stride);
    for (int64_t k = 0; p.ratios && k < depth; ++k) {
      const double* column = packed + k * stride;
      const int64_t found = outliers(column, column + p.first, p);
      if (found > 0 && off == 0) {
        int64_t r = 0;
        while (!is_outlier(column[r], column[p.first + r], p.ratios[r], p.step)) ++r;
        where = static_cast<double>((begin + k) * p.first + r);
      }
      off += found;
    }
    for (int64_t k = 0; k < depth; k += kWideRows) {
      const double* columns = packed + k * stride;
      const int live = static_cast<int>(std::min<int64_t>(depth - k, kWideRows));
      const auto add = [&](int64_t from, int64_t count) {
        constexpr int kVecs = std::min(2 * kProbes / kWidth, 2), kStep = kVecs * kWidth / 2;
        for (int j = 0; j < kProbes; j += kStep)
          wide_tile<kVecs>({columns + from, stride, 1}, {p.products + from * kProbes + j, 0, kProbes}, count, sums + j,
                           kProbes);
      };
      std::fill(sums, sums + kWideRows * kProbes, 0.0);
      add(0, p.first);
      part += sum_of_squares(sums, live * kProbes);
      add(p.first, last);
      for (int i = 0; i < live; ++i) {
        const double square = sum_of_squares(sums + i * kProbes, kProbes) / kProbes;
        const double may = p.allowed + weighted_squares(columns + i * stride + p.first, factors, last);
        whole += square;
        if (square <= worst * may) continue;
        worst = may > 0 ? square / may : std::numeric_limits<double>::infinity();
        index = static_cast<double>(begin + k + i);
      }
    }
  }
  const double out[lorakern::kLineNumbers] = {whole, part / kProbes, worst, index, static_cast<double>(off), where};
  std::copy(out, out + lorakern::kLineNumbers, u.out);
}

inline void from_double(double value, double* out) { *out = value; }
template <typename T>
void from_double(double value, T* out) {
  from_float(static_cast<float>(value), out);
}

template <typename T>
void combine_into(const ColumnUnit<lorakern::CombineProblem>& u, double* packed) {
  const lorakern::CombineProblem& p = *u.problem;
  const int64_t rows = p.x.rows, stride = packed_stride(rows), width = packed_width(p.y.rows);
  double *factors = packed + kPackedColumns * stride, *sums = factors + rows * width;
  T* y = static_cast<T*>(const_cast<void*>(p.y.data));
  std::fill(packed, sums, 0.0);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < p.y.rows; ++j) factors[r * width + j] = p.factors[j * rows + r];
  for (int64_t begin = u.begin; begin < u.end; begin += kPackedColumns) {
    const int64_t depth = std::min(u.end - begin, kPackedColumns);
    pack(p.x, begin, depth, packed, stride);
    for (int64_t k = 0; k < depth; k += kWideRows)
      for (int64_t j = 0; j < p.y.rows; j += kWidth) {
        std::fill(sums, sums + kWideRows * kWidth, 0.0);
        wide_tile<2>({packed + k * stride, stride, 1}, {factors + j, 0, width}, rows, sums, kWidth);
        const int64_t columns = std::min<int64_t>(depth - k, kWideRows), live = std::min<int64_t>(p.y.rows - j, kWidth);
        for (int64_t i = 0; i < columns; ++i)
          for (int64_t n = 0; n < live; ++n)
            from_double(sums[i * kWidth + n], y + (j + n) * p.y.row_stride + (begin + k + i) * p.y.column_stride);
      }
  }
}

inline void combine(const ColumnUnit<lorakern::CombineProblem>& u, double* packed) {
  switch (u.problem->y.dtype) {
    case Dtype::kFloat32:
      return combine_into<float>(u, packed);
    case Dtype::kFloat16:
      return combine_into<f16>(u, packed);
    case Dtype::kBFloat16:
      return combine_into<bf16>(u, packed);
    case Dtype::kFloat64:
      return combine_into<double>(u, packed);
  }
}

}  // namespace
