// shrink and expand as units of work, for the ISA whose simd_*.h was included before.
#pragma once
#include <cmath>

#include "tiles.h"
#include "variant.h"

namespace {

using lorakern::ExpandJob;
using lorakern::ExpandUnit;
using lorakern::factor_of;
using lorakern::GateUnit;
using lorakern::kSumFloats;
using lorakern::LoraParams;
using lorakern::Pairs;
using lorakern::rank_of;
using lorakern::RouterParams;
using lorakern::ShrinkUnit;
using lorakern::token_of;

// Few tokens: A is read once, from end to end, as four stretches of rows side by side, since one stream does not keep
// enough of memory's lines in flight. Many: a block of x stays in L1 while a block of A, in L2, passes by. Either way
// the sum of a block of d_in is made alone and then added to h.
template <typename T>
void shrink(const LoraParams& p, const ShrinkUnit& u, float*) {
  constexpr int64_t kFewTokens = 12, kRows = 64;
  const Weight& weight = p.A[u.slice];
  const T* rows = static_cast<const T*>(weight.data) + u.pairs.slot * weight.slot_stride;
  float* h = p.h + u.slice * p.num_tokens * p.num_choices * p.r_max;
  // All tokens from `i` on that make a tile, against `count` rows, or kTileRows at `step` from each other.
  const auto tiles = [&](int64_t row, int64_t count, int64_t step, int64_t begin, int64_t i) {
    const int m = static_cast<int>(std::min<int64_t>(u.pairs.count - i, kTileTokens));
    const int64_t depth = std::min(p.d_in - begin, kDotBlock), stride = weight.row_stride;
    const T* x[kTileTokens];
    float* out[kTileTokens];
    for (int j = 0; j < m; ++j) {
      const int64_t pair = u.pairs.ids[i + j];
      x[j] = static_cast<const T*>(p.x) + token_of(p, pair) * p.x_stride;
      out[j] = h + pair * p.r_max + row;
    }
    const T* w = rows + row * stride;
    with_constant<kTileTokens>(m, [&](auto M) {
      for (; count >= kTileRows; count -= kTileRows, w += kTileRows * stride) {
        dot_tile<T, decltype(M)::value, kTileRows>(x, w, step * stride, begin, depth, out, step);
        for (int j = 0; j < m; ++j) out[j] += kTileRows;
      }
      for (; count > 0; --count, w += stride) {
        dot_tile<T, decltype(M)::value, 1>(x, w, stride, begin, depth, out, 1);
        for (int j = 0; j < m; ++j) ++out[j];
      }
    });
  };
  const auto all = [&](int64_t row, int64_t count, int64_t step) {
    for (int64_t i = 0; i < u.pairs.count; i += kTileTokens)
      for (int64_t begin = 0; begin == 0 || begin < p.d_in; begin += kDotBlock) tiles(row, count, step, begin, i);
  };
  if (u.pairs.count <= kFewTokens) {
    const int64_t stretch = (u.row_end - u.row_begin) / kTileRows, rest = u.row_begin + stretch * kTileRows;
    for (int64_t row = u.row_begin; row < u.row_begin + stretch; ++row) all(row, kTileRows, stretch);
    if (rest < u.row_end) all(rest, u.row_end - rest, 1);
  } else {
    for (int64_t row = u.row_begin; row < u.row_end; row += kRows) all(row, std::min(kRows, u.row_end - row), 1);
  }
}

// The sum over the rank is made vector by vector, its rows in four interleaved parts: the same for a pair in any batch.
inline void gate(const RouterParams& r, const GateUnit& u) {
  constexpr int kParts = 4;
  const LoraParams& p = r.lora;
  const Weight& weight = r.cores[u.slice];
  const float* core = static_cast<const float*>(weight.data) + u.pairs.slot * weight.slot_stride;
  const int64_t rank = rank_of(p, u.pairs.slot), first_pair = u.slice * p.num_tokens * p.num_choices;
  const float scale = 1.0f / std::sqrt(static_cast<float>(r.router_rank));
  for (int64_t i = 0; i < u.pairs.count; ++i) {
    const int64_t pair = u.pairs.ids[i];
    const float* h = p.h + (first_pair + pair) * p.r_max;
    const float* q = r.query + (u.slice * p.num_tokens + token_of(p, pair)) * r.router_rank;
    Vec total[kParts] = {vec_zero(), vec_zero(), vec_zero(), vec_zero()};
    for (int64_t c = 0; c < rank; c += kWidth) {
      const int live = static_cast<int>(std::min<int64_t>(rank - c, kWidth));
      const auto load = [&](const float* from)
                            ALWAYS_INLINE_LAMBDA { return live == kWidth ? vec_load(from) : vec_load_n(from, live); };
      Vec key[kParts] = {vec_zero(), vec_zero(), vec_zero(), vec_zero()};
      for (int64_t k = 0; k < r.router_rank; k += kParts)
        for (int j = 0; j < kParts && k + j < r.router_rank; ++j)
          key[j] = vec_fma(vec_set(q[k + j]), load(core + (k + j) * weight.row_stride + c), key[j]);
      for (int j = 0; j < kParts; ++j) total[j] = vec_fma(key[j], load(h + c), total[j]);
    }
    float sums[kParts];
    vec_sum4(total, sums);
    r.gates[first_pair + pair] = ((sums[0] + sums[1]) + (sums[2] + sums[3])) * scale;
  }
}

// out (+)= factor * value for kWidth columns, or the first `live` of them.
template <typename D>
ALWAYS_INLINE void add_vec(D* out, Vec value, float factor, bool accumulate) {
  vec_store(out, vec_fma(vec_set(factor), value, accumulate ? vec_load(out) : vec_zero()));
}

// The same for V vectors.
template <int V, typename D>
ALWAYS_INLINE void add_vecs(D* out, const Vec* value, float factor, bool accumulate) {
  const Vec by = vec_set(factor);
#pragma GCC unroll 4
  for (int v = 0; v + 2 <= V; v += 2) {
    Vec old[2] = {vec_zero(), vec_zero()};
    if (accumulate) vec_load2(out + v * kWidth, old);
    vec_store2(out + v * kWidth, vec_fma(by, value[v], old[0]), vec_fma(by, value[v + 1], old[1]));
  }
  if (V % 2) add_vec(out + (V - 1) * kWidth, value[V - 1], factor, accumulate);
}

template <typename D>
void add_vec_n(D* out, Vec value, float factor, bool accumulate, int live) {
  vec_store_n(out, vec_fma(vec_set(factor), value, accumulate ? vec_load_n(out, live) : vec_zero()), live);
}

// panel_tile<M, V> added to M rows of `out`; only the first `live` columns exist.
template <typename T, int M, int V, typename D>
void add_panel(const typename Outer<T>::Cell* const* left, int64_t step, const typename Outer<T>::Cell* panel,
               int64_t count, D* const* out, const float* factor, int64_t live, bool accumulate) {
  if (live >= V * kWidth)
    panel_tile<T, M, V>(left, step, panel, count, [&](int m, const Vec* sums) ALWAYS_INLINE_LAMBDA {
      add_vecs<V>(out[m], sums, factor[m], accumulate);
    });
  else
    panel_tile<T, M, V>(left, step, panel, count, [&](int m, const Vec* sums) ALWAYS_INLINE_LAMBDA {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const int64_t n = std::min<int64_t>(live - v * kWidth, kWidth);
        if (n > 0) add_vec_n(out[m] + v * kWidth, sums[v], factor[m], accumulate, static_cast<int>(n));
      }
    });
}

// Where the terms of a range of columns go: the output itself, or float32 sums where a token may get several terms.
template <typename D>
struct Target {
  D* data;  // row of first_token, first column of the range
  int64_t stride, first_token, width;
  bool accumulate;
};

// Tokens of one slot as the left side of an expand: M <= kTileTokens rows at a time.
template <typename T, typename D>
struct Left {
  const typename Outer<T>::Cell* cells[kTileTokens];
  D* out[kTileTokens];
  float factor[kTileTokens];
};

// Read a byte of every cache line of kWidth rows, in order of address. A tile takes rows wider than a line in pieces,
// an order in which the hardware does not see what comes next.
template <typename T>
ALWAYS_INLINE void touch_rows(const T* rows, int64_t stride, int64_t rank) {
  constexpr int64_t kLine = 64;
  const int64_t bytes = rank * static_cast<int64_t>(sizeof(T));
  for (int i = 0; bytes > kLine && i < kWidth; ++i)
    for (int64_t at = 0; at < bytes; at += kLine) {
      const char touched = reinterpret_cast<const char*>(rows + i * stride)[at];
      asm volatile("" ::"r"(touched));
    }
}

// Few tokens against all columns of the range, the weight rows read as they lie.
template <typename T, int M, typename D>
ALWAYS_INLINE void expand_rows(const Left<T, D>& left, const T* rows, int64_t stride, int64_t rank, int64_t width,
                               bool accumulate) {
  int64_t c = 0;
  Vec sum[M];
  for (; c + kWidth <= width; c += kWidth, rows += kWidth * stride) {
    touch_rows(rows, stride, rank);
    direct_tile<T, M, true>(left.cells, rows, stride, rank, kWidth, sum);
    for (int m = 0; m < M; ++m) add_vec(left.out[m] + c, sum[m], left.factor[m], accumulate);
  }
  if (c < width) {
    const int live = static_cast<int>(width - c);
    direct_tile<T, M, false>(left.cells, rows, stride, rank, live, sum);
    for (int m = 0; m < M; ++m) add_vec_n(left.out[m] + c, sum[m], left.factor[m], accumulate, live);
  }
}

// The same, compiled once more for one or two tokens and rows of exactly one vector: their addresses are constants.
template <typename T, int M, typename D>
void expand_directly(const Left<T, D>& left, const T* rows, int64_t stride, int64_t rank, int64_t width,
                     bool accumulate) {
  if (M <= 2 && stride == kWidth && rank == kWidth)
    expand_rows<T, M>(left, rows, kWidth, kWidth, width, accumulate);
  else
    expand_rows<T, M>(left, rows, stride, rank, width, accumulate);
}

inline int64_t no_scratch(const ShrinkUnit&) { return 0; }

constexpr int64_t kPackedCells = 1 << 15;  // of weights, packed for many tokens: an eighth of L2

// How many columns are packed at a time.
inline int64_t chunk_columns(int64_t cells) {
  return std::max<int64_t>(1, kPackedCells / (std::max<int64_t>(cells, 1) * kPanelColumns)) * kPanelColumns;
}

// Pairs of one slot against the columns of weight w that begin at `begin`.
template <typename T, typename D>
void add_slot(const ExpandJob& job, int w, const Pairs& pairs, int64_t begin, const Target<D>& target, float* scratch) {
  using Cell = typename Outer<T>::Cell;
  const LoraParams& p = *job.params;
  const Weight& weight = job.weights[w];
  const int64_t rank = rank_of(p, pairs.slot), cells = cells_of<T>(rank);
  const int64_t stride = p.packed && job.by_columns ? rank : weight.row_stride;
  const T* rows =
      static_cast<const T*>(weight.data) + pairs.slot * weight.slot_stride + begin * (job.by_columns ? stride : 1);
  Cell* left_cells = reinterpret_cast<Cell*>(scratch);
  for (int64_t i = 0; i < pairs.count; ++i)
    Outer<T>::pack_sums(job.left[w] + pairs.ids[i] * p.r_max, rank, left_cells + i * cells);
  const auto take = [&](int64_t i, int m, int64_t column) {
    Left<T, D> left;
    for (int j = 0; j < m; ++j) {
      const int64_t pair = pairs.ids[i + j];
      left.cells[j] = left_cells + (i + j) * cells;
      left.out[j] = target.data + (token_of(p, pair) - target.first_token) * target.stride + column;
      left.factor[j] = job.use_factors ? factor_of(p, job.gates, pairs.slot, pair) : 1.0f;
    }
    return left;
  };
  if (job.by_columns && pairs.count <= kTileTokens) {
    const Left<T, D> left = take(0, static_cast<int>(pairs.count), 0);
    with_constant<kTileTokens>(static_cast<int>(pairs.count), [&](auto M) {
      expand_directly<T, decltype(M)::value>(left, rows, stride, rank, target.width, target.accumulate);
    });
    return;
  }
  Cell* panels = left_cells + pairs.count * cells;
  const int64_t chunk = chunk_columns(cells), panel_size = cells * kPanelColumns;
  for (int64_t first = 0; first < target.width; first += chunk) {
    const int64_t columns = std::min(chunk, target.width - first);
    for (int64_t c = 0; c < columns; c += kPanelColumns) {
      Cell* panel = panels + c / kPanelColumns * panel_size;
      if (job.by_columns)
        pack_columns(rows + (first + c) * stride, stride, rank, columns - c, kTileVecs, panel);
      else
        pack_rows<T>([&](int64_t k) { return rows + k * stride + first + c; }, rank, columns - c, kTileVecs, panel);
    }
    for (int64_t i = 0; i < pairs.count; i += kTileTokens) {
      const int m = static_cast<int>(std::min<int64_t>(pairs.count - i, kTileTokens));
      Left<T, D> left = take(i, m, first);
      with_constant<kTileTokens>(m, [&](auto M) {
        const Cell* panel = panels;
        for (int64_t c = 0; c < columns; c += kPanelColumns, panel += panel_size) {
          add_panel<T, decltype(M)::value, kTileVecs>(left.cells, 1, panel, cells, left.out, left.factor, columns - c,
                                                      target.accumulate);
          for (int j = 0; j < decltype(M)::value; ++j) left.out[j] += kPanelColumns;
        }
      });
    }
  }
}

// How a slot is added: what a unit needs for it, in floats, and add_slot. lora_amx.h has another one.
template <typename T>
struct Panels {
  static int64_t scratch(const ExpandJob& job, int64_t most_pairs) {
    const int64_t cells = cells_of<T>(job.params->r_max);
    return most_pairs * cells + std::max(kPackedCells, cells * kPanelColumns);
  }
  template <typename U, typename D>
  static void add(const ExpandJob& job, int w, const Pairs& pairs, int64_t begin, const Target<D>& target,
                  float* scratch) {
    add_slot<U>(job, w, pairs, begin, target, scratch);
  }
};

// How many tokens' float32 sums fit in the scratch of a thread, 0 where the terms go straight to the output.
inline int64_t sum_tokens(const ExpandJob& job, const ExpandUnit& unit) {
  if (!job.served) return 0;
  const int64_t fit = kSumFloats / (unit.column_end - unit.column_begin);
  return std::min(std::max<int64_t>(fit, 16), unit.token_end - unit.token_begin);
}

// Floats to the end of their last cache line: what follows them in the scratch is aligned too.
constexpr int64_t whole_lines(int64_t floats) { return (floats + 15) / 16 * 16; }

template <typename Slots>
int64_t expand_scratch(const ExpandJob& job, const ExpandUnit& unit) {
  int64_t most = 0;
  for (int64_t i = 0; i < unit.num_groups; ++i) most = std::max(most, unit.groups[i].count);
  return Slots::scratch(job, most) + whole_lines(sum_tokens(job, unit) * (unit.column_end - unit.column_begin));
}

template <typename T, typename Slots>
void expand(const ExpandJob& job, const ExpandUnit& unit, float* scratch) {
  const LoraParams& p = *job.params;
  const int64_t begin = unit.column_begin, width = unit.column_end - begin, block = sum_tokens(job, unit);
  T* out = static_cast<T*>(job.out) + begin;
  if (block == 0) {
    const Target<T> target{out, job.out_stride, 0, width, job.accumulate};
    for (int64_t i = 0; i < unit.num_groups; ++i)
      Slots::template add<T>(job, 0, unit.groups[i], begin, target, scratch);
    return;
  }
  // Terms of a token are added in ascending order of weight, then of slot: the same in every batch.
  float* sums = scratch;
  scratch += whole_lines(block * width);
  for (int64_t token = unit.token_begin; token < unit.token_end; token += block) {
    const int64_t stop = std::min(token + block, unit.token_end);
    std::fill(sums, sums + (stop - token) * width, 0.0f);
    const Target<float> target{sums, width, token, width, true};
    for (int w = 0; w < job.num_weights; ++w) {
      for (int64_t i = 0; i < unit.num_groups; ++i) {
        const Pairs& all = unit.groups[i];
        const int32_t* first = std::lower_bound(all.ids, all.ids + all.count, token * p.num_choices);
        const int32_t* last = std::lower_bound(first, all.ids + all.count, stop * p.num_choices);
        if (first < last) Slots::template add<T>(job, w, Pairs{all.slot, first, last - first}, begin, target, scratch);
      }
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
