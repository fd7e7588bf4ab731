// Products of points as units of work: inner products of all pairs, and distances to centroids. Points of any dtype and
// strides are packed as float32, a column of all points after the other, and multiplied there; where the CPU multiplies
// bfloat16 as it is, points of bfloat16 are packed as pairs of columns instead.
#pragma once
#include <limits>

#include "gram_unit.h"
#include "tiles.h"

namespace {

using lorakern::AssignUnit;
using lorakern::CentersUnit;
using lorakern::Points;
using lorakern::PointsUnit;

// A tile has kWideRows rows and up to kProductVecs vectors: with AVX-512, 24 sums, 3 operands and a broadcast.
constexpr int kProductVecs = kWidth == 4 ? 2 : 3;

// Neighbours in a packed column start a cache line each, and columns an odd number of lines from each other: with an
// even one, those that a tile walks through would share few sets of the cache.
inline int64_t points_stride(int64_t count) { return ((count + kWidth + 15) / 16 | 1) * 16; }

// out[i][j] (+)= sum over `depth` cells of left[i] * right[j], for kWideRows rows i and V vectors of neighbours j.
template <typename O, int V>
void product_tile(const typename O::Cell* left, int64_t left_stride, const typename O::Cell* right,
                  int64_t right_stride, int64_t depth, float* out, int64_t out_stride, bool add) {
  Vec sums[kWideRows][V];
#pragma GCC unroll 8
  for (int i = 0; i < kWideRows; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sums[i][v] = vec_zero();
  for (int64_t k = 0; k < depth; ++k, left += left_stride, right += right_stride) {
    typename O::Operand operands[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) operands[v] = O::load(right + v * kWidth);
#pragma GCC unroll 8
    for (int i = 0; i < kWideRows; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[i][v] = O::step(left + i, operands[v], sums[i][v]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kWideRows; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      float* to = out + i * out_stride + v * kWidth;
      vec_store(to, add ? vec_add(vec_load(to), sums[i][v]) : sums[i][v]);
    }
}

// Scale packed columns row by row, and take the mean of each away.
inline void scale_and_center(float* packed, int64_t count, int64_t depth, int64_t stride, const float* scales) {
  for (int64_t k = 0; k < depth; ++k, packed += stride) {
    for (int64_t r = 0; scales && r < count; ++r) packed[r] *= scales[r];
    Vec sums[4] = {vec_zero(), vec_zero(), vec_zero(), vec_zero()};
    for (int64_t r = 0; r < packed_width(count); r += kWidth) sums[0] = vec_add(sums[0], vec_load(packed + r));
    float totals[4];
    vec_sum4(sums, totals);
    const float mean = totals[0] / static_cast<float>(count);
    for (int64_t r = 0; r < count; ++r) packed[r] -= mean;
  }
}

// Columns begin .. begin + depth as pairs: a cell holds two neighbours of a row.
template <typename O>
void pack_pairs(const Rows& x, int64_t begin, int64_t depth, typename O::Cell* out, int64_t stride) {
  constexpr int kCells = kWidth / 2;
  for (int64_t s = 0; s < x.num_sets; out += x.sets[s++].rows) {
    const RowSet& set = x.sets[s];
    const bf16* data = static_cast<const bf16*>(set.data) + begin * set.column_stride;
    for (int64_t r = 0; r < set.rows; r += kWidth) {
      const int live = static_cast<int>(std::min<int64_t>(set.rows - r, kWidth));
      if (set.row_stride == 1) {
        for (int64_t k = 0; k < depth; k += 2) {
          const bf16* from = data + k * set.column_stride + r;
          const bf16* rows[2] = {from, k + 1 < depth ? from + set.column_stride : nullptr};
          O::pack_rows(rows, live, out + k / 2 * stride + r);
        }
        continue;
      }
      for (int64_t k = 0; k < depth; k += kWidth) {
        const int some = static_cast<int>(std::min<int64_t>(depth - k, kWidth));
        typename O::Operand cells[kCells];
        const bf16* from = data + r * set.row_stride + k * set.column_stride;
        if (set.column_stride == 1) {
          for (int i = 0; i < live; ++i) __builtin_prefetch(from + i * set.row_stride + 2 * kPackedColumns);
          if (live == kWidth && some == kWidth)
            O::template load_block<true>(from, set.row_stride, live, some, cells);
          else
            O::template load_block<false>(from, set.row_stride, live, some, cells);
        } else {
          bf16 block[kWidth * kWidth] = {};
          for (int i = 0; i < live; ++i)
            for (int j = 0; j < some; ++j) block[i * kWidth + j] = from[i * set.row_stride + j * set.column_stride];
          O::template load_block<true>(block, kWidth, kWidth, kWidth, cells);
        }
        for (int i = 0; 2 * i < some; ++i) std::memcpy(out + (k / 2 + i) * stride + r, &cells[i], sizeof(cells[i]));
      }
    }
  }
}

inline void scale_products(const PointsUnit& u, const float* scales) {
  const int64_t count = u.points->count, width = packed_width(count);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = i; j < count; ++j) u.out[i * width + j] *= scales[i] * scales[j];
}

inline int64_t points_scratch(int64_t count) { return points_stride(count) * kPackedColumns; }

// The part of X X^T that is on or right of the diagonal, (width, width), over some columns of a part.
template <typename O>
void points_gram_of(const PointsUnit& u, typename O::Cell* packed) {
  const Rows& x = u.points->parts[u.part];
  const float* scales = u.points->scales ? u.points->scales + u.part * x.rows : nullptr;
  const int64_t width = packed_width(x.rows), stride = points_stride(x.rows), columns = kPackedColumns * O::kPack;
  clear_padding(x.rows, packed, stride);
  for (int64_t begin = u.begin; begin < u.end; begin += columns) {
    const int64_t depth = std::min(u.end - begin, columns), cells = (depth + O::kPack - 1) / O::kPack;
    if constexpr (O::kPack == 2) {
      pack_pairs<O>(x, begin, depth, packed, stride);
    } else {
      pack(x, begin, depth, packed, stride);
      if (u.center) scale_and_center(packed, x.rows, depth, stride, scales);
    }
    for (int64_t j = 0; j < width; j += kProductVecs * kWidth) {
      const int vecs = static_cast<int>(std::min<int64_t>((width - j) / kWidth, kProductVecs));
      for (int64_t i = 0; i < j + vecs * kWidth; i += kWideRows) {
        const int left_of_it = i > j ? static_cast<int>((i - j) / kWidth) : 0;
        const int64_t from = j + left_of_it * kWidth;
        with_constant<kProductVecs>(vecs - left_of_it, [&](auto v) {
          product_tile<O, v()>(packed + i, stride, packed + from, stride, cells, u.out + i * width + from, width,
                               begin > u.begin);
        });
      }
    }
  }
  if (scales && !u.center) scale_products(u, scales);
}

// Can the points be multiplied as bfloat16? What is left of their means cannot.
inline bool all_bfloat16(const PointsUnit& u) {
  const Rows& x = u.points->parts[u.part];
  bool all = !u.center;
  for (int64_t s = 0; s < x.num_sets; ++s) all = all && x.sets[s].dtype == Dtype::kBFloat16;
  return all;
}

inline void points_gram(const PointsUnit& u, float* packed) {
  if constexpr (Outer<bf16>::kPack == 2)
    if (all_bfloat16(u)) return points_gram_of<Outer<bf16>>(u, reinterpret_cast<Outer<bf16>::Cell*>(packed));
  points_gram_of<Outer<float>>(u, packed);
}

// Some columns of all centroids: what is left of their mean, packed, that mean, and the squares' sums.
inline void pack_centers(const CentersUnit& u) {
  const RowSet set{u.problem->centroids, Dtype::kFloat32, u.problem->k, u.problem->points.columns, 1};
  const int64_t k = u.problem->k, stride = points_stride(k);
  std::fill(u.squares, u.squares + k, 0.0);
  for (int64_t column = u.begin; column < u.end; ++column)
    std::fill(u.packed + column * stride, u.packed + (column + 1) * stride, 0.0f);
  pack_any(set, u.begin, u.end - u.begin, u.packed + u.begin * stride, stride);
  for (int64_t column = u.begin; column < u.end; ++column) {
    float* packed = u.packed + column * stride;
    float sum = 0;
    for (int64_t c = 0; c < k; ++c) sum += packed[c];
    const float mean = u.mean[column] = sum / static_cast<float>(k);
    for (int64_t c = 0; c < k; ++c) {
      packed[c] -= mean;
      u.squares[c] += static_cast<double>(packed[c]) * packed[c];
    }
  }
}

// Elements k .. k + some of rows r .. r + live of a set whose rows do not lie in one piece, one vector to a row.
template <typename T>
void load_rows(const RowSet& set, int64_t r, int live, int64_t k, int some, Vec* rows) {
  const T* from = static_cast<const T*>(set.data) + r * set.row_stride + k * set.column_stride;
  if (set.row_stride == 1) {
    if (live == kWidth && some == kWidth)
      load_block<true>(from, set.column_stride, some, live, rows);
    else
      load_block<false>(from, set.column_stride, some, live, rows);
  } else {
    for (int i = 0; i < live; ++i) {
      float values[kWidth] = {};
      for (int j = 0; j < some; ++j) values[j] = to_float(from[i * set.row_stride + j * set.column_stride]);
      rows[i] = vec_load(values);
    }
  }
}

template <typename T, typename F>
ALWAYS_INLINE void for_each_vector_of(const RowSet& set, int64_t row, int64_t begin, int64_t end, const F& f) {
  if (set.column_stride == 1) {
    for (int64_t r = 0; r < set.rows; ++r) {
      const T* from = static_cast<const T*>(set.data) + r * set.row_stride;
      for (int64_t k = begin; k < end; k += kWidth) {
        const int some = static_cast<int>(std::min<int64_t>(end - k, kWidth));
        __builtin_prefetch(from + k + (end - begin), 0, 2);  // what is read of this row next
        f(row + r, k, some, some == kWidth ? vec_load(from + k) : vec_load_n(from + k, some));
      }
    }
    return;
  }
  for (int64_t r = 0; r < set.rows; r += kWidth)
    for (int64_t k = begin; k < end; k += kWidth) {
      const int live = static_cast<int>(std::min<int64_t>(set.rows - r, kWidth)),
                some = static_cast<int>(std::min<int64_t>(end - k, kWidth));
      Vec rows[kWidth];
      if (set.row_stride == 1)  // what is read of these rows next
        for (int i = 0; i < some; ++i)
          __builtin_prefetch(static_cast<const T*>(set.data) + r + (k + i + end - begin) * set.column_stride, 0, 2);
      load_rows<T>(set, r, live, k, some, rows);
      for (int i = 0; i < live; ++i) f(row + r + i, k, some, rows[i]);
    }
}

// Call f(row, column, elements, vector) for some columns of all rows, kWidth elements at a time; rows ascend for each
// column.
template <typename F>
ALWAYS_INLINE void for_each_vector(const Rows& x, int64_t begin, int64_t end, const F& f) {
  int64_t row = 0;
  for (int64_t s = 0; s < x.num_sets; row += x.sets[s++].rows) switch (x.sets[s].dtype) {
      case Dtype::kFloat16:
        for_each_vector_of<f16>(x.sets[s], row, begin, end, f);
        break;
      case Dtype::kBFloat16:
        for_each_vector_of<bf16>(x.sets[s], row, begin, end, f);
        break;
      default:
        for_each_vector_of<float>(x.sets[s], row, begin, end, f);
    }
}

constexpr int64_t kAssignRows = 96;  // of a unit at most: whole panels of every ISA

inline int64_t assign_rows(int64_t k) {
  constexpr int64_t kPanel = kProductVecs * kWidth;
  return std::clamp<int64_t>((1 << 16) / k / kPanel, 1, kAssignRows / kPanel) * kPanel;
}

// Packed points, their products with all centroids, their squares, what is nearest so far, and which.
inline int64_t assign_scratch(int64_t k) {
  const int64_t rows = assign_rows(k), stride = points_stride(rows);
  return stride * kPackedColumns + (k + kWideRows) * rows + 4 * stride;
}

inline void nearest_centers(const AssignUnit& u, const float* products, int64_t stride, float* best, int32_t* label) {
  std::fill(best, best + u.count, std::numeric_limits<float>::infinity());
  std::fill(label, label + u.count, 0);
  for (int64_t c = 0; c < u.problem->k; ++c, products += stride)
    for (int64_t r = 0; r < u.count; ++r) {
      const float score = u.squares[c] - 2 * products[r];
      label[r] = score < best[r] ? static_cast<int32_t>(c) : label[r];
      best[r] = score < best[r] ? score : best[r];
    }
}

// ||x - centroid||^2 of each point and its own centroid, from the differences themselves.
inline void own_distances(const AssignUnit& u, const int32_t* label, float* out) {
  const lorakern::AssignProblem& p = *u.problem;
  double sums[kAssignRows] = {};
  for (int64_t part = 0, first = 0; part < p.points.num_parts; first += u.parts[part++].columns) {
    const float* scales = u.scales(part);
    for (int64_t begin = 0; begin < u.parts[part].columns; begin += kPackedColumns)
      for_each_vector(u.parts[part], begin, std::min(begin + kPackedColumns, u.parts[part].columns),
                      [&](int64_t row, int64_t k, int some, Vec x) ALWAYS_INLINE_LAMBDA {
                        const float* from = p.centroids + label[row] * p.points.columns + first + k;
                        float own[kWidth] = {}, values[kWidth], scale = scales ? scales[row] : 1.0f;
                        std::memcpy(own, from, some * sizeof(float));
                        vec_store(values, x);
                        double lanes[4] = {};
                        for (int l = 0; l < kWidth; ++l) {
                          const double difference = static_cast<double>(values[l]) * scale - own[l];
                          lanes[l % 4] += difference * difference;
                        }
                        sums[row] += (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
                      });
  }
  for (int64_t r = 0; r < u.count; ++r) out[r] = static_cast<float>(sums[r]);
}

inline void assign(const AssignUnit& u, float* scratch) {
  const lorakern::AssignProblem& p = *u.problem;
  const int64_t rows = assign_rows(p.k), stride = points_stride(rows), center_stride = points_stride(p.k);
  float *packed = scratch, *products = packed + stride * kPackedColumns, *squares = products + (p.k + kWideRows) * rows;
  float* best = squares + stride;
  auto* label = reinterpret_cast<int32_t*>(best + stride);
  clear_padding(u.count, packed, stride);
  std::fill(squares, squares + stride, 0.0f);
  for (int64_t part = 0, first = 0; part < p.points.num_parts; first += u.parts[part++].columns) {
    const float* scales = u.scales(part);
    for (int64_t begin = 0; begin < u.parts[part].columns; begin += kPackedColumns) {
      const int64_t depth = std::min(u.parts[part].columns - begin, static_cast<int64_t>(kPackedColumns));
      pack(u.parts[part], begin, depth, packed, stride);
      for (int64_t k = 0; k < depth; ++k) {
        float* column = packed + k * stride;
        const float mean = u.mean[first + begin + k];
        for (int64_t r = 0; r < u.count; ++r) column[r] = column[r] * (scales ? scales[r] : 1.0f) - mean;
        for (int64_t r = 0; p.distances && r < u.count; ++r) squares[r] += column[r] * column[r];
      }
      const float* centers = u.centers + (first + begin) * center_stride;
      for (int64_t r = 0; r < u.count; r += kProductVecs * kWidth)
        for (int64_t c = 0; c < p.k; c += kWideRows)
          product_tile<Outer<float>, kProductVecs>(centers + c, center_stride, packed + r, stride, depth,
                                                   products + c * rows + r, rows, first + begin > 0);
    }
  }
  for (int64_t r = 0; p.distances && r < u.count; ++r)
    for (int64_t c = 0; c < p.k; ++c)
      p.distances[(u.begin + r) * p.k + c] = std::max(squares[r] + u.squares[c] - 2 * products[c * rows + r], 0.0f);
  if (!p.labels) return;
  nearest_centers(u, products, rows, best, label);
  for (int64_t r = 0; r < u.count; ++r) p.labels[u.begin + r] = label[r];
  if (p.sqdist) own_distances(u, label, p.sqdist + u.begin);
}

}  // namespace
