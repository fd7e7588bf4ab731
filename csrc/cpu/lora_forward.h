// shrink and expand as units of work, for the ISA whose simd_*.h was included before.
#pragma once
#include "tiles.h"
#include "variant.h"

namespace {

using lorakern::Dtype;
using lorakern::ExpandJob;
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

// out (+)= value for `live` columns of a row.
template <typename T>
void add_row(T* out, const Vec* value, float factor, int64_t live, bool accumulate) {
  for (int v = 0; v < kTileVecs && live > 0; ++v, live -= kWidth, out += kWidth) {
    if (live >= kWidth) {
      vec_store(out, vec_fma(vec_set(factor), value[v], accumulate ? vec_load(out) : vec_zero()));
    } else {
      const int n = static_cast<int>(live);
      vec_store_n(out, vec_fma(vec_set(factor), value[v], accumulate ? vec_load_n(out, n) : vec_zero()), n);
    }
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

// The pairs of one slot that lie in [first, last) of `order`, against one range of columns.
// sums is null where every token gets one term: out is then written directly.
template <typename T>
void expand_slot(const ExpandJob& job, int w, int64_t slot, int64_t first, int64_t last, int64_t begin, int64_t end,
                 float* panel, float* sums, int64_t first_token) {
  const LoraParams& p = *job.params;
  const Weight& weight = job.weights[w];
  const T* rows = static_cast<const T*>(weight.data) + slot * weight.slot_stride;
  const int64_t rank = rank_of(p, slot), width = end - begin;
  for (int64_t column = begin; column < end; column += kPanelColumns) {
    const int64_t live = end - column < kPanelColumns ? end - column : kPanelColumns;
    if (job.by_columns)
      pack_columns(rows + column * weight.row_stride, weight.row_stride, rank, live, panel);
    else
      pack_rows<T>([&](int64_t k) { return rows + k * weight.row_stride + column; }, rank, live, panel);
    for (int64_t i = first; i < last; i += kTileTokens) {
      const int m = static_cast<int>(last - i < kTileTokens ? last - i : kTileTokens);
      const float* left[kTileTokens];
      for (int j = 0; j < m; ++j) left[j] = job.left[w] + p.plan.order[i + j] * p.r_max;
      Vec acc[kTileTokens][kTileVecs];
      panel_tiles(m, left, panel, rank, acc);
      for (int j = 0; j < m; ++j) {
        const int64_t pair = p.plan.order[i + j], token = pair / p.num_choices;
        const float factor = job.use_factors ? factor_of(p, slot, pair) : 1.0f;
        if (sums)
          add_row(sums + (token - first_token) * width + column - begin, acc[j], factor, live, true);
        else
          add_row(static_cast<T*>(job.out) + token * job.out_stride + column, acc[j], factor, live, job.accumulate);
      }
    }
  }
}

template <typename T>
void expand(const ExpandJob& job, int64_t begin, int64_t end, float* scratch) {
  const LoraParams& p = *job.params;
  const int32_t *order = p.plan.order, *starts = p.plan.starts;
  float *panel = scratch, *sums = scratch + p.r_max * kPanelColumns;
  const int64_t width = end - begin, block = sum_tokens(job, width);
  if (block == 0) {
    for (int64_t slot = 0; slot < p.num_slots; ++slot)
      if (starts[slot] < starts[slot + 1] && rank_of(p, slot) > 0)
        expand_slot<T>(job, 0, slot, starts[slot], starts[slot + 1], begin, end, panel, nullptr, 0);
    return;
  }
  // Terms of a token are added in ascending order of slot, then of weight: the same in every batch.
  for (int64_t token = 0; token < p.num_tokens; token += block) {
    const int64_t stop = token + block < p.num_tokens ? token + block : p.num_tokens;
    for (int64_t i = 0; i < (stop - token) * width; ++i) sums[i] = 0;
    for (int64_t slot = 0; slot < p.num_slots; ++slot) {
      if (rank_of(p, slot) == 0) continue;
      int64_t first = starts[slot], last = starts[slot + 1];
      while (first < last && order[first] < token * p.num_choices) ++first;
      while (first < last && order[last - 1] >= stop * p.num_choices) --last;
      for (int w = 0; w < job.num_weights && first < last; ++w)
        expand_slot<T>(job, w, slot, first, last, begin, end, panel, sums, token);
    }
    for (int64_t t = token; t < stop; ++t) {
      if (!job.served[t]) continue;
      T* out = static_cast<T*>(job.out) + t * job.out_stride + begin;
      const float* sum = sums + (t - token) * width;
      for (int64_t c = 0; c < width; c += kWidth) {
        const int64_t live = width - c;
        const Vec value = live >= kWidth ? vec_load(sum + c) : vec_load_n(sum + c, static_cast<int>(live));
        const Vec one[kTileVecs] = {value};
        add_row(out + c, one, 1.0f, live < kWidth ? live : kWidth, job.accumulate);
      }
    }
  }
}

}  // namespace
