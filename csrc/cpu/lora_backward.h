// The backward of shrink and expand as units of work, on the same micro-kernels.
#pragma once
#include "lora_forward.h"

namespace {

using lorakern::BackUnit;
using lorakern::LoraGradParams;
using lorakern::OuterJob;

constexpr int64_t kDepth = 256;  // how much of the summed dimension is packed, and summed on its own, at a time

// How many vectors of a panel hold `columns` columns: a power of two, or all.
inline int vecs_of(int64_t columns) {
  int vecs = 1;
  while (vecs < kTileVecs && vecs * kWidth < columns) vecs = std::min(2 * vecs, kTileVecs);
  return vecs;
}

// add_panel for any number of rows and vectors, to float32.
template <typename T>
void add_panels(int m, int vecs, const typename Outer<T>::Cell* const* left, int64_t step,
                const typename Outer<T>::Cell* panel, int64_t count, float* const* out, int64_t live, bool accumulate) {
  float ones[kTileTokens];
  std::fill(ones, ones + kTileTokens, 1.0f);
  with_constant<kTileTokens>(m, [&](auto M) {
    const auto add = [&](auto V) {
      add_panel<T, decltype(M)::value, decltype(V)::value>(left, step, panel, count, out, ones, live, accumulate);
    };
    if (vecs == 1) return add(std::integral_constant<int, 1>());
    if (vecs == 2) return add(std::integral_constant<int, 2>());
    add(std::integral_constant<int, kTileVecs>());
  });
}

template <typename T>
int64_t back_scratch(const LoraParams&) {
  return cells_of<T>(kDepth) * kPanelColumns + (kDepth + 1) * kTileTokens;
}

template <typename T>
void back(const LoraGradParams& g, const BackUnit& u, float* scratch) {
  using Cell = typename Outer<T>::Cell;
  const LoraParams& p = g.forward;
  const Weight& weight = p.B[u.slice];
  const T* rows = static_cast<const T*>(weight.data) + u.pairs.slot * weight.slot_stride;
  const T* dy = static_cast<const T*>(g.dy);
  for (int s = 0; s < u.slice; ++s) dy += p.B[s].rows;
  float* dh = g.dh + u.slice * p.num_tokens * p.num_choices * p.r_max;
  Cell *panel = reinterpret_cast<Cell*>(scratch), *converted = panel + cells_of<T>(kDepth) * kPanelColumns;
  const int64_t rank = rank_of(p, u.pairs.slot);
  for (int64_t r = 0; r < rank; r += kPanelColumns) {
    const int64_t live = std::min<int64_t>(rank - r, kPanelColumns);
    const int vecs = vecs_of(live);
    for (int64_t o = 0; o < weight.rows; o += kDepth) {
      const int64_t depth = std::min(weight.rows - o, kDepth);
      pack_rows<T>([&](int64_t k) { return rows + (o + k) * weight.row_stride + r; }, depth, live, vecs, panel);
      for (int64_t i = 0; i < u.pairs.count; i += kTileTokens) {
        const int m = static_cast<int>(std::min<int64_t>(u.pairs.count - i, kTileTokens));
        const Cell* left[kTileTokens];
        float* out[kTileTokens];
        for (int j = 0; j < m; ++j) {
          const int64_t pair = u.pairs.ids[i + j];
          left[j] = row_cells(dy + token_of(p, pair) * g.dy_stride + o, depth, converted + j * (kDepth + 1));
          out[j] = dh + pair * p.r_max + r;
        }
        add_panels<T>(m, vecs, left, 1, panel, cells_of<T>(depth), out, live, o > 0);
      }
    }
  }
}

template <typename T>
int64_t outer_scratch(const LoraParams& p) {
  const int64_t ranks = (p.r_max + kPanelColumns - 1) / kPanelColumns * kPanelColumns;
  return cells_of<T>(kDepth) * (kPanelColumns + ranks) + kPanelColumns * ranks;
}

// Gradient rows (rank, column), or transposed (column, rank): the left side's ranks and the right side's columns are
// packed alike, token by token, and either may be the panel.
template <typename T>
void outer(const OuterJob& job, int64_t slot, int64_t begin, int64_t end, float* scratch) {
  using Cell = typename Outer<T>::Cell;
  const LoraParams& p = *job.params;
  const int64_t rank = rank_of(p, slot), first = p.plan.starts[slot], last = p.plan.starts[slot + 1];
  const int64_t sum_stride =
      job.transposed ? (rank + kPanelColumns - 1) / kPanelColumns * kPanelColumns : kPanelColumns;
  Cell *columns = reinterpret_cast<Cell*>(scratch), *ranks = columns + cells_of<T>(kDepth) * kPanelColumns;
  float* sums =
      scratch + outer_scratch<T>(p) - kPanelColumns * ((p.r_max + kPanelColumns - 1) / kPanelColumns * kPanelColumns);
  T* grad = static_cast<T*>(job.grad) + slot * p.r_max * job.columns;
  for (int64_t column = begin; column < end; column += kPanelColumns) {
    const int64_t live = std::min<int64_t>(end - column, kPanelColumns);
    for (int64_t i = first; i < last; i += kDepth) {
      const int64_t depth = std::min(last - i, kDepth), count = cells_of<T>(depth);
      const int32_t* pairs = p.plan.order + i;
      const T* right = static_cast<const T*>(job.right) + column;
      pack_rows<T>([&](int64_t k) { return right + token_of(p, pairs[k]) * job.right_stride; }, depth, live, kTileVecs,
                   columns);
      for (int64_t r = 0; r < rank; r += kPanelColumns) {
        const int64_t some = std::min<int64_t>(rank - r, kPanelColumns);
        const int vecs = vecs_of(some);
        pack_rows<T>([&](int64_t k) { return job.left + pairs[k] * p.r_max + r; }, depth, some, vecs, ranks);
        const int64_t rows = job.transposed ? live : some;
        for (int64_t row = 0; row < rows; row += kTileTokens) {
          const int m = static_cast<int>(std::min<int64_t>(rows - row, kTileTokens));
          const Cell* left[kTileTokens];
          float* out[kTileTokens];
          for (int j = 0; j < m; ++j) {
            left[j] = (job.transposed ? columns : ranks) + row + j;
            out[j] = job.transposed ? sums + (row + j) * sum_stride + r : sums + (r + row + j) * sum_stride;
          }
          if (job.transposed)
            add_panels<T>(m, vecs, left, kPanelColumns, ranks, count, out, vecs * kWidth, i > first);
          else
            add_panels<T>(m, kTileVecs, left, vecs * kWidth, columns, count, out, kPanelColumns, i > first);
        }
      }
    }
    const int64_t rows = job.transposed ? live : rank, width = job.transposed ? rank : live;
    T* out = job.transposed ? grad + column * p.r_max : grad + column;
    const int64_t stride = job.transposed ? p.r_max : job.columns;
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t c = 0; c < width; c += kWidth) {
        const Vec value = vec_load(sums + row * sum_stride + c);
        if (width - c >= kWidth)
          vec_store(out + row * stride + c, value);
        else
          vec_store_n(out + row * stride + c, value, static_cast<int>(width - c));
      }
  }
}

template <typename T>
constexpr lorakern::Variant variant(const char* name) {
  return {name,    kPanelColumns,    shrink<T>, expand_scratch<T>, expand<T>, back_scratch<T>,
          back<T>, outer_scratch<T>, outer<T>};
}

// One table entry per Dtype, in its order.
#define LORAKERN_VARIANTS(name) {variant<float>(name), variant<f16>(name), variant<bf16>(name)}

}  // namespace
