// The backward of shrink and expand as units of work, on the same micro-kernels.
#pragma once
#include "lora_forward.h"

namespace {

using lorakern::BackUnit;
using lorakern::LoraGradParams;
using lorakern::OuterJob;

constexpr int64_t kDepth = 256;  // how much of the summed dimension is packed at a time

inline int64_t back_scratch(const LoraParams&) { return kDepth * (kPanelColumns + kTileTokens); }

template <typename T>
void back(const LoraGradParams& g, const BackUnit& u, float* scratch) {
  const LoraParams& p = g.forward;
  const Weight& weight = p.B[u.slice];
  const T* rows = static_cast<const T*>(weight.data) + u.slot * weight.slot_stride;
  const T* dy = static_cast<const T*>(g.dy);
  for (int s = 0; s < u.slice; ++s) dy += p.B[s].rows;
  float *dh = g.dh + u.slice * p.num_tokens * p.num_choices * p.r_max, *panel = scratch;
  float* packed = scratch + kDepth * kPanelColumns;
  const int64_t rank = rank_of(p, u.slot);
  for (int64_t r = 0; r < rank; r += kPanelColumns) {
    const int64_t live = rank - r < kPanelColumns ? rank - r : kPanelColumns;
    for (int64_t o = 0; o < weight.rows; o += kDepth) {
      const int64_t depth = weight.rows - o < kDepth ? weight.rows - o : kDepth;
      pack_rows<T>([&](int64_t k) { return rows + (o + k) * weight.row_stride + r; }, depth, live, panel);
      for (int64_t i = u.first; i < u.last; i += kTileTokens) {
        const int m = static_cast<int>(u.last - i < kTileTokens ? u.last - i : kTileTokens);
        const float* left[kTileTokens];
        for (int j = 0; j < m; ++j) {
          const T* source = dy + p.plan.order[i + j] / p.num_choices * g.dy_stride + o;
          for (int64_t k = 0; k < depth; ++k) packed[j * kDepth + k] = to_float(source[k]);
          left[j] = packed + j * kDepth;
        }
        Vec acc[kTileTokens][kTileVecs];
        panel_tiles(m, left, panel, depth, acc);
        for (int j = 0; j < m; ++j) add_row(dh + p.plan.order[i + j] * p.r_max + r, acc[j], 1.0f, live, o > 0);
      }
    }
  }
}

inline int64_t outer_scratch(const LoraParams& p) {
  return kDepth * kPanelColumns + p.r_max * (kDepth + kPanelColumns) + kPanelColumns * kWidth;
}

template <typename T>
void outer(const OuterJob& job, int64_t slot, int64_t begin, int64_t end, float* scratch) {
  const LoraParams& p = *job.params;
  const int64_t rank = rank_of(p, slot), first = p.plan.starts[slot], last = p.plan.starts[slot + 1];
  float *panel = scratch, *packed = panel + kDepth * kPanelColumns, *sums = packed + p.r_max * kDepth;
  T* grad = static_cast<T*>(job.grad) + slot * p.r_max * job.columns;
  for (int64_t column = begin; column < end; column += kPanelColumns) {
    const int64_t live = end - column < kPanelColumns ? end - column : kPanelColumns;
    for (int64_t i = first; i < last; i += kDepth) {
      const int64_t depth = last - i < kDepth ? last - i : kDepth;
      const int32_t* pairs = p.plan.order + i;
      pack_rows<T>(
          [&](int64_t k) {
            return static_cast<const T*>(job.right) + pairs[k] / p.num_choices * job.right_stride + column;
          },
          depth, live, panel);
      for (int64_t k = 0; k < depth; ++k)
        for (int64_t r = 0; r < rank; ++r) packed[r * kDepth + k] = job.left[pairs[k] * p.r_max + r];
      for (int64_t r = 0; r < rank; r += kTileTokens) {
        const int m = static_cast<int>(rank - r < kTileTokens ? rank - r : kTileTokens);
        const float* left[kTileTokens];
        for (int j = 0; j < m; ++j) left[j] = packed + (r + j) * kDepth;
        Vec acc[kTileTokens][kTileVecs];
        panel_tiles(m, left, panel, depth, acc);
        for (int j = 0; j < m; ++j) add_row(sums + (r + j) * kPanelColumns, acc[j], 1.0f, kPanelColumns, i > first);
      }
    }
    if (!job.transposed) {
      for (int64_t r = 0; r < rank; ++r)
        for (int64_t c = 0; c < live; ++c) from_float(sums[r * kPanelColumns + c], grad + r * job.columns + column + c);
    } else {
      for (int64_t c = 0; c < live; ++c)
        for (int64_t r = 0; r < rank; ++r) from_float(sums[r * kPanelColumns + c], grad + (column + c) * p.r_max + r);
    }
  }
}

template <typename T>
constexpr lorakern::Variant variant(const char* name) {
  return {name, kPanelColumns, shrink<T>, expand_scratch, expand<T>, back_scratch, back<T>, outer_scratch, outer<T>};
}

// One table entry per Dtype, in its order.
#define LORAKERN_VARIANTS(name) {variant<float>(name), variant<f16>(name), variant<bf16>(name)}

}  // namespace
