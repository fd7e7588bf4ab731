// The backward of shrink and expand as units of work, on the same micro-kernels.
#pragma once
#include "centroid_unit.h"
#include "lloyd_unit.h"
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
int64_t back_scratch() {
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

inline int64_t panels_of(int64_t columns) { return (columns + kPanelColumns - 1) / kPanelColumns; }

// Panels side by side, each of the vectors that its columns need, at the distance of full ones.
template <typename T, typename Row>
void pack_panels(const Row& row, int64_t depth, int64_t columns, typename Outer<T>::Cell* out) {
  for (int64_t c = 0; c < columns; c += kPanelColumns, out += cells_of<T>(depth) * kPanelColumns)
    pack_rows<T>([&](int64_t k) { return row(k) + c; }, depth, std::min<int64_t>(columns - c, kPanelColumns),
                 vecs_of(columns - c), out);
}

template <typename T>
int64_t outer_scratch(const LoraParams& p, int64_t columns) {
  const int64_t most = std::min(p.num_tokens * p.num_choices, kDepth);
  const int64_t sides = (panels_of(columns) + panels_of(p.r_max)) * kPanelColumns;
  return cells_of<T>(most) * sides + panels_of(p.r_max) * kPanelColumns * panels_of(columns) * kPanelColumns;
}

// Gradient rows (rank, column), or transposed (column, rank): both sides are packed alike, token by token, and either
// may be the panel. Sums are in float32 until all tokens of the slot are through.
template <typename T>
void outer(const OuterJob& job, int64_t slot, int64_t begin, int64_t end, float* scratch) {
  using Cell = typename Outer<T>::Cell;
  const LoraParams& p = *job.params;
  const int64_t rank = rank_of(p, slot), first = p.plan.starts[slot], last = p.plan.starts[slot + 1];
  const int64_t most = cells_of<T>(std::min(last - first, kDepth)), width = end - begin;
  const int64_t rows = job.transposed ? width : rank, sum_width = job.transposed ? rank : width;
  const int64_t sum_stride = panels_of(sum_width) * kPanelColumns;
  Cell* columns = reinterpret_cast<Cell*>(scratch);
  Cell* ranks = columns + panels_of(width) * most * kPanelColumns;
  float* sums = reinterpret_cast<float*>(ranks + panels_of(rank) * most * kPanelColumns);
  for (int64_t i = first; i < last; i += kDepth) {
    const int64_t depth = std::min(last - i, kDepth), count = cells_of<T>(depth), panel = count * kPanelColumns;
    const int32_t* pairs = p.plan.order + i;
    const T* right = static_cast<const T*>(job.right) + begin;
    pack_panels<T>([&](int64_t k) { return right + token_of(p, pairs[k]) * job.right_stride; }, depth, width, columns);
    pack_panels<T>([&](int64_t k) { return job.left + pairs[k] * p.r_max; }, depth, rank, ranks);
    const Cell *left = job.transposed ? columns : ranks, *over = job.transposed ? ranks : columns;
    for (int64_t c = 0; c < sum_width; c += kPanelColumns)
      for (int64_t top = 0; top < rows; top += kPanelColumns) {
        const int vecs = vecs_of(sum_width - c), step = vecs_of(rows - top) * kWidth;
        const int64_t bottom = std::min(top + kPanelColumns, rows);
        for (int64_t row = top; row < bottom; row += kTileTokens) {
          const int m = static_cast<int>(std::min<int64_t>(bottom - row, kTileTokens));
          const Cell* from[kTileTokens];
          float* out[kTileTokens];
          for (int j = 0; j < m; ++j) {
            from[j] = left + top / kPanelColumns * panel + row - top + j;
            out[j] = sums + (row + j) * sum_stride + c;
          }
          add_panels<T>(m, vecs, from, step, over + c / kPanelColumns * panel, count, out, vecs * kWidth, i > first);
        }
      }
  }
  T* grad = static_cast<T*>(job.grad) + slot * p.r_max * job.columns + begin * (job.transposed ? p.r_max : 1);
  const int64_t stride = job.transposed ? p.r_max : job.columns;
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t c = 0; c < sum_width; c += kWidth) {
      const Vec value = vec_load(sums + row * sum_stride + c);
      if (sum_width - c >= kWidth)
        vec_store(grad + row * stride + c, value);
      else
        vec_store_n(grad + row * stride + c, value, static_cast<int>(sum_width - c));
    }
}

template <typename T>
constexpr lorakern::Variant variant(const char* name) {
  return {name,
          kPanelColumns,
          kTileRows,
          no_scratch,
          shrink<T>,
          expand_scratch<Panels<T>>,
          expand<T, Panels<T>>,
          gate,
          back_scratch<T>,
          back<T>,
          outer_scratch<T>,
          outer<T>,
          packed_width,
          packed_scratch,
          gram,
          sketch,
          lines,
          combine,
          points_stride,
          points_scratch,
          points_gram,
          pack_centers,
          assign_rows,
          assign_scratch,
          assign,
          update_scratch,
          update,
          seed_scratch,
          seed,
          lloyd_scratch,
          lloyd};
}

// One table entry per Dtype, in its order.
#define LORAKERN_VARIANTS(name) {variant<float>(name), variant<f16>(name), variant<bf16>(name)}

}  // namespace
