// shrink and expand as units of work, for the ISA whose simd_*.h was included before.
#pragma once
#include "tiles.h"
#include "variant.h"

namespace {

using lorakern::Dtype;
using lorakern::ExpandJob;
using lorakern::ExpandUnit;
using lorakern::LoraParams;
using lorakern::ShrinkUnit;

template <typename T>
void shrink(const LoraParams& p, const ShrinkUnit& u) {
  const Weight& weight = p.A[u.slice];
  const T* rows = static_cast<const T*>(weight.data) + u.slot * weight.slot_stride;
  float* h = p.h + u.slice * p.num_tokens * p.num_choices * p.r_max;
  for (int64_t row = u.row_begin; row < u.row_end; row += kTileRows) {
    const int n = static_cast<int>(u.row_end - row < kTileRows ? u.row_end - row : kTileRows);
    for (int64_t i = u.first; i < u.last; i += kTileTokens) {
      const int m = static_cast<int>(u.last - i < kTileTokens ? u.last - i : kTileTokens);
      const T* x[kTileTokens];
      float* out[kTileTokens];
      for (int j = 0; j < m; ++j) {
        const int64_t pair = p.plan.order[i + j];
        x[j] = static_cast<const T*>(p.x) + pair / p.num_choices * p.x_stride;
        out[j] = h + pair * p.r_max + row;
      }
      dot_tiles(m, n, x, rows + row * weight.row_stride, weight.row_stride, p.d_in, out);
    }
  }
}

// out (+)= factor * value for kWidth columns, or the first `live` of them.
template <typename D>
ALWAYS_INLINE void add_vec(D* out, Vec value, float factor, bool accumulate) {
  vec_store(out, vec_fma(vec_set(factor), value, accumulate ? vec_load(out) : vec_zero()));
}
template <typename D>
void add_vec_n(D* out, Vec value, float factor, bool accumulate, int live) {
  vec_store_n(out, vec_fma(vec_set(factor), value, accumulate ? vec_load_n(out, live) : vec_zero()), live);
}

// The same for `live` <= kPanelColumns columns.
template <typename D>
void add_row(D* out, const Vec* value, float factor, int64_t live, bool accumulate) {
  for (int v = 0; v < kTileVecs && live > 0; ++v, live -= kWidth, out += kWidth) {
    if (live >= kWidth)
      add_vec(out, value[v], factor, accumulate);
    else
      add_vec_n(out, value[v], factor, accumulate, static_cast<int>(live));
  }
}

constexpr int64_t kSumFloats = 1 << 17;  // of float32 sums a thread keeps when tokens get several terms: half of L2

inline int64_t sum_tokens(const ExpandJob& job, int64_t columns) {
  if (job.params->num_choices * job.num_weights == 1) return 0;
  const int64_t fit = kSumFloats / columns, tokens = job.params->num_tokens;
  return tokens < fit ? tokens : fit < 16 ? 16 : fit;
}

inline int64_t expand_scratch(const ExpandJob& job, int64_t columns) {
  return job.params->r_max * kPanelColumns + sum_tokens(job, columns) * columns;
}

// Where the terms of a range of columns go: the output itself, or float32 sums where a token may get several terms.
template <typename D>
struct Target {
  D* data;  // row of first_token, first column of the range
  int64_t stride, first_token, width;
  bool accumulate;
};

// One slot's weight rows against the range of columns of M of its tokens, without packing.
template <int M, typename T, typename D>
ALWAYS_INLINE void expand_directly(const T* rows, int64_t stride, int64_t rank, const float* const* left, D* const* out,
                                   const float* factor, int64_t width, bool accumulate) {
  int64_t c = 0;
  Vec acc[M];
  for (; c + kWidth <= width; c += kWidth, rows += kWidth * stride) {
    direct_tile<true, M>(left, rows, stride, rank, kWidth, acc);
    for (int m = 0; m < M; ++m) add_vec(out[m] + c, acc[m], factor[m], accumulate);
  }
  if (c < width) {
    const int live = static_cast<int>(width - c);
    direct_tile<false, M>(left, rows, stride, rank, live, acc);
    for (int m = 0; m < M; ++m) add_vec_n(out[m] + c, acc[m], factor[m], accumulate, live);
  }
}

// The same, compiled once more for rows that are exactly one vector: their addresses are then constants.
template <int M, typename T, typename D>
void expand_few(const T* rows, int64_t stride, int64_t rank, const float* const* left, D* const* out,
                const float* factor, int64_t width, bool accumulate) {
  if (stride == kWidth && rank == kWidth)
    expand_directly<M>(rows, kWidth, kWidth, left, out, factor, width, accumulate);
  else
    expand_directly<M>(rows, stride, rank, left, out, factor, width, accumulate);
}

// `count` pairs of one slot, against the columns of weight w that begin at `begin`.
template <typename T, typename D>
void expand_slot(const ExpandJob& job, int w, int64_t slot, const int32_t* pairs, int64_t count, int64_t begin,
                 const Target<D>& target, float* panel) {
  const LoraParams& p = *job.params;
  const Weight& weight = job.weights[w];
  const int64_t rank = rank_of(p, slot), stride = weight.row_stride, width = target.width;
  const T* rows =
      static_cast<const T*>(weight.data) + slot * weight.slot_stride + begin * (job.by_columns ? stride : 1);
  const float* left[kTileTokens];
  D* out[kTileTokens];
  float factor[kTileTokens];
  const auto take = [&](const int32_t* some, int m) {
    for (int j = 0; j < m; ++j) {
      const int64_t pair = some[j], token = p.num_choices == 1 ? pair : pair / p.num_choices;
      left[j] = job.left[w] + pair * p.r_max;
      out[j] = target.data + (token - target.first_token) * target.stride;
      factor[j] = job.use_factors ? factor_of(p, slot, pair) : 1.0f;
    }
  };
  if (job.by_columns && count <= 2) {
    take(pairs, static_cast<int>(count));
    if (count == 1)
      expand_few<1>(rows, stride, rank, left, out, factor, width, target.accumulate);
    else
      expand_few<2>(rows, stride, rank, left, out, factor, width, target.accumulate);
    return;
  }
  for (int64_t c = 0; c < width; c += kPanelColumns) {
    const int64_t live = width - c < kPanelColumns ? width - c : kPanelColumns;
    if (job.by_columns)
      pack_columns(rows + c * stride, stride, rank, live, panel);
    else
      pack_rows<T>([&](int64_t k) { return rows + k * stride + c; }, rank, live, panel);
    for (int64_t i = 0; i < count; i += kTileTokens) {
      const int m = static_cast<int>(count - i < kTileTokens ? count - i : kTileTokens);
      take(pairs + i, m);
      Vec acc[kTileTokens][kTileVecs];
      panel_tiles(m, left, panel, rank, acc);
      for (int j = 0; j < m; ++j) add_row(out[j] + c, acc[j], factor[j], live, target.accumulate);
    }
  }
}

template <typename T>
void expand(const ExpandJob& job, const ExpandUnit& unit, float* scratch) {
  const LoraParams& p = *job.params;
  const int64_t begin = unit.column_begin, end = unit.column_end;
  const int32_t *order = p.plan.order, *starts = p.plan.starts;
  float *panel = scratch, *sums = scratch + p.r_max * kPanelColumns;
  const int64_t width = end - begin, block = sum_tokens(job, width);
  T* out = static_cast<T*>(job.out) + begin;
  if (block == 0) {
    const Target<T> target{out, job.out_stride, 0, width, job.accumulate};
    for (int64_t slot = unit.slot_begin; slot < unit.slot_end; ++slot)
      if (starts[slot] < starts[slot + 1] && rank_of(p, slot) > 0)
        expand_slot<T>(job, 0, slot, order + starts[slot], starts[slot + 1] - starts[slot], begin, target, panel);
    return;
  }
  // Terms of a token are added in ascending order of slot, then of weight: the same in every batch.
  for (int64_t token = 0; token < p.num_tokens; token += block) {
    const int64_t stop = token + block < p.num_tokens ? token + block : p.num_tokens;
    for (int64_t i = 0; i < (stop - token) * width; ++i) sums[i] = 0;
    const Target<float> target{sums, width, token, width, true};
    for (int64_t slot = 0; slot < p.num_slots; ++slot) {
      if (rank_of(p, slot) == 0) continue;
      int64_t first = starts[slot], last = starts[slot + 1];
      while (first < last && order[first] < token * p.num_choices) ++first;
      while (first < last && order[last - 1] >= stop * p.num_choices) --last;
      for (int w = 0; w < job.num_weights && first < last; ++w)
        expand_slot<T>(job, w, slot, order + first, last - first, begin, target, panel);
    }
    for (int64_t t = token; t < stop; ++t) {
      if (!job.served[t]) continue;
      const float* sum = sums + (t - token) * width;
      T* row = out + t * job.out_stride;
      int64_t c = 0;
      for (; c + kWidth <= width; c += kWidth) add_vec(row + c, vec_load(sum + c), 1.0f, job.accumulate);
      const int rest = static_cast<int>(width - c);
      if (rest > 0) add_vec_n(row + c, vec_load_n(sum + c, rest), 1.0f, job.accumulate, rest);
    }
  }
}

}  // namespace
