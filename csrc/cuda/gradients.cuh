// The gradients that are matrix products, one kernel each: back (of h), inputs (of x) and outer (of A and B).
#pragma once
#include "product.cuh"

namespace lorakern::cuda {

constexpr int kPairs = 64;  // of one slot, in a block of back

// The depth of the tiles: what a thread has room for in registers.
template <typename T>
constexpr int kDepthOf = sizeof(T) == 4 ? 32 : 64;

constexpr int kTokens = 32;  // in a block of inputs: one per lane
constexpr int kInputColumns = 128;
constexpr int kOuterColumns = 64;

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Takes the coordinates of a block out of its number, the fastest first.
struct Coordinates {
  int64_t rest;

  __device__ int64_t next(int64_t size) {
    const int64_t coordinate = rest % size;
    rest /= size;
    return coordinate;
  }
};

// Whatever a plan holds, what it leads to is inside of the arrays.
__device__ __forceinline__ int start_of(const Routing& r, int64_t slot) {
  return static_cast<int>(max(int64_t{0}, min(int64_t{r.plan.starts[slot]}, pairs_of(r))));
}

__device__ __forceinline__ int pair_at(const Routing& r, int64_t position) {
  return static_cast<int>(max(int64_t{0}, min(int64_t{r.plan.order[position]}, pairs_of(r) - 1)));
}

template <typename T>
__device__ __forceinline__ const T* row_of(const Weight& weight, int64_t slot, int64_t row) {
  return static_cast<const T*>(weight.data) + slot * weight.slot_stride + row * weight.row_stride;
}

// The factors of a pair in h or dh, and in a plane of dh.
__device__ __forceinline__ float* factors_of(const BackwardParams& p, float* factors, int slice, int64_t pair,
                                             int64_t plane = 0) {
  return factors + ((plane * p.num_slices + slice) * pairs_of(p.routing) + pair) * p.routing.r_max;
}

struct PairTile {
  int slot, first, count;  // pairs order[first] .. order[first + count - 1]
};

inline int64_t num_pair_tiles(const Routing& r) { return pairs_of(r) / kPairs + r.num_slots; }

// Slot i owns the tiles from starts[i] / kPairs + i on: room for all its pairs, found without counting those of others.
__device__ __forceinline__ PairTile pair_tile(const Routing& r, int64_t tile) {
  int64_t slot = 0, end = r.num_slots;
  while (end - slot > 1) {
    const int64_t middle = (slot + end) / 2;
    (start_of(r, middle) / kPairs + middle <= tile ? slot : end) = middle;
  }
  const int start = start_of(r, slot);
  const int64_t first = start + (tile - start / kPairs - slot) * kPairs;
  const int64_t count = first < start ? 0 : min(int64_t{kPairs}, start_of(r, slot + 1) - first);
  return {static_cast<int>(slot), static_cast<int>(first), static_cast<int>(count)};
}

template <typename T, int kRanks>
struct BackShared {
  using Tiles = Product<T, kPairs, kRanks, kDepthOf<T>, false>;
  typename Tiles::Shared tiles;
  int tokens[kPairs];
};

// A plane of dh[p] = B^T dy[t].
template <typename T, int kRanks>
__global__ void __launch_bounds__(kThreads, 2) back(const __grid_constant__ BackwardParams p, int64_t blocks) {
  using Shared = BackShared<T, kRanks>;
  using Tiles = typename Shared::Tiles;
  constexpr int kDepth = kDepthOf<T>;
  auto& shared = *reinterpret_cast<Shared*>(dynamic_shared());
  const Routing& r = p.routing;
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    Coordinates at{block};
    const int64_t first_rank = at.next(ceil_div(r.r_max, kRanks)) * kRanks, plane = at.next(p.num_planes);
    const int slice = static_cast<int>(at.next(p.num_slices));
    const PairTile tile = pair_tile(r, at.rest);
    const Weight& weight = p.B[slice];
    const int rank = rank_of(r, tile.slot);
    const int64_t length = ceil_div(ceil_div(weight.rows, p.num_planes), kDepth) * kDepth;
    const int64_t begin = plane * length, end = min(begin + length, weight.rows);
    if (tile.count <= 0 || first_rank >= rank) continue;

    const int thread = static_cast<int>(threadIdx.x);
    if (thread < kPairs)
      shared.tokens[thread] =
          thread < tile.count ? static_cast<int>(split(r, pair_at(r, tile.first + thread)).token) : -1;
    __syncthreads();
    const T* dy = static_cast<const T*>(p.dy) + first_column_of(p.B, slice);
    typename Tiles::Left left;
    Transfer<T, kDepth, kRanks> right;
    const auto load = [&](int64_t depth) {
      left.load([&](int row, int column) -> Span<T> {
        const int token = shared.tokens[row];
        return {token < 0 ? nullptr : dy + token * p.dy_stride, depth + column, end};
      });
      right.load([&](int row, int column) -> Span<T> {
        return {depth + row < end ? row_of<T>(weight, tile.slot, depth + row) : nullptr, first_rank + column, rank};
      });
    };
    Tiles product;
    load(begin);
    for (int64_t depth = begin; depth < end; depth += kDepth) {
      left.template store<Tiles::kLeftStride>(shared.tiles.left);
      right.template store<Tiles::kRightStride>(shared.tiles.right);
      __syncthreads();
      load(depth + kDepth);
      product.add(shared.tiles, static_cast<int>(min(end - depth, int64_t{kDepth})));
      __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (Tiles::row(i) >= tile.count) continue;
      float* dh = factors_of(p, p.dh, slice, pair_at(r, tile.first + Tiles::row(i)), plane);
#pragma unroll
      for (int j = 0; j < Tiles::kColumnsPerLane; ++j) {
        const int64_t column = first_rank + Tiles::column(j);
        if (column < rank) dh[column] = product.at(i, j);
      }
    }
    __syncthreads();  // before the next round overwrites tokens
  }
}

template <typename T>
struct InputsShared {
  using Tiles = Product<T, kTokens, kInputColumns, kDepthOf<T>, false>;
  typename Tiles::Shared tiles;
  int tokens[kTokens];
};

// dx[t] = the sum over k and slices of A^T (f dh), for 32 tokens and `width` tiles of columns a block.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    inputs(const __grid_constant__ BackwardParams p, int64_t blocks, int64_t width) {
  using Tiles = typename InputsShared<T>::Tiles;
  constexpr int kDepth = kDepthOf<T>;
  auto& shared = *reinterpret_cast<InputsShared<T>*>(dynamic_shared());
  const Routing& r = p.routing;
  const int lane = threadIdx.x % kWarp;
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    Coordinates at{block};
    const int64_t begin = at.next(ceil_div(p.d_in, width * kInputColumns)) * width * kInputColumns;
    const int64_t position = at.rest * kTokens + lane;
    // In the plan's order few slots meet in a block.
    const int token = position >= r.num_tokens ? -1
                      : r.num_choices == 1     ? pair_at(r, position)
                                               : static_cast<int>(position);
    if (threadIdx.x < kTokens) shared.tokens[lane] = token;
    __syncthreads();
    const int own_tokens[2] = {shared.tokens[Tiles::row(0)], shared.tokens[Tiles::row(1)]};

    for (int64_t first_column = begin; first_column < min(begin + width * kInputColumns, p.d_in);
         first_column += kInputColumns) {
      Tiles product;
      if (!p.first_call) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
          for (int j = 0; j < Tiles::kColumnsPerLane; ++j) {
            const int64_t column = first_column + Tiles::column(j);
            if (own_tokens[i] >= 0 && column < p.d_in) product.at(i, j) = p.dx_sum[own_tokens[i] * p.d_in + column];
          }
        }
      }
      for (int64_t choice = 0; choice < r.num_choices; ++choice) {
        const int own_slot = token < 0 ? -1 : slot_of(r, token * r.num_choices + choice);
        // Every warp goes through the slots of the block's tokens alike: its lane l looks at token l.
        for (uint32_t waiting = __ballot_sync(0xffffffffu, own_slot >= 0); waiting != 0;) {
          const int slot = __shfl_sync(0xffffffffu, own_slot, __ffs(waiting) - 1);
          const uint32_t served = __ballot_sync(0xffffffffu, own_slot == slot);
          waiting &= ~served;
          // The ranks of all slices are one sum, each slice padded to whole chunks.
          const int rank = rank_of(r, slot), padded = (rank + kChunk - 1) / kChunk * kChunk;
          const int depth = p.num_slices * padded;
          for (int first = 0; first < depth; first += kDepth) {
            Transfer<float, kTokens, kDepth> left;
            Transfer<T, kDepth, kInputColumns> right;
            left.load([&](int row, int column) -> Span<float> {
              const int place = first + column;
              if (place >= depth || !(served >> row & 1)) return {};
              const int64_t pair = shared.tokens[row] * r.num_choices + choice;
              return {factors_of(p, p.dh, place / padded, pair), place % padded, rank};
            });
            right.load([&](int row, int column) -> Span<T> {
              const int place = first + row, row_in_slice = place % padded;
              if (place >= depth || row_in_slice >= rank) return {};
              return {row_of<T>(p.A[place / padded], slot, row_in_slice), first_column + column, p.d_in};
            });
            left.template store<Tiles::kLeftStride>(shared.tiles.left);
            right.template store<Tiles::kRightStride>(shared.tiles.right);
            __syncthreads();
            product.add(shared.tiles, min(depth - first, kDepth), served >> Tiles::row(0) & 1,
                        served >> Tiles::row(1) & 1);
            __syncthreads();
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (own_tokens[i] < 0) continue;
        const int64_t row = own_tokens[i] * p.d_in;
#pragma unroll
        for (int j = 0; j < Tiles::kColumnsPerLane; j += 2) {
          const int64_t column = first_column + Tiles::column(j), live = p.d_in - column;
          if (live <= 0) continue;
          if (p.last_call) {
            store_pair(static_cast<T*>(p.dx) + row + column, product.at(i, j), product.at(i, j + 1), live);
          } else {
            store_pair(p.dx_sum + row + column, product.at(i, j), product.at(i, j + 1), live);
          }
        }
      }
    }
    __syncthreads();  // before the next round overwrites tokens
  }
}

// Zeros in a matrix whose rows are `stride` apart.
template <typename T>
__device__ __forceinline__ void clear(T* to, int rows, int columns, int64_t stride) {
  for (int i = static_cast<int>(threadIdx.x); i < rows * columns; i += kThreads)
    to[i / columns * stride + i % columns] = from_float<T>(0.0f);
}

template <typename T, int kRanks>
struct OuterShared {
  using Tiles = Product<T, kRanks, kOuterColumns, kDepthOf<T>, true>;
  struct Row {
    int pair, token;
  };
  typename Tiles::Shared tiles;
  Row next_rows[2][kDepthOf<T>];  // of the tiles that are loaded next, and of those after them
};

// dA[slot] = the sum of (f dh) x^T and dB[slot] = the sum of dy (f h)^T over the pairs of a slot, in the plan's order.
// Ranks that the slot does not have, and slots without pairs, get zeros.
template <typename T, int kRanks>
__global__ void __launch_bounds__(kThreads, 2)
    outer(const __grid_constant__ BackwardParams p, int64_t blocks, int64_t column_tiles) {
  using Shared = OuterShared<T, kRanks>;
  using Tiles = typename Shared::Tiles;
  using Row = typename Shared::Row;
  constexpr int kDepth = kDepthOf<T>;
  auto& shared = *reinterpret_cast<Shared*>(dynamic_shared());
  const Routing& r = p.routing;
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    Coordinates at{block};
    const int64_t first_rank = at.next(ceil_div(r.r_max, kRanks)) * kRanks;
    const int64_t first_column = at.next(column_tiles) * kOuterColumns;
    const bool of_A = at.next(2) == 0;
    const int slice = static_cast<int>(at.next(p.num_slices));
    const int64_t slot = at.rest, columns = of_A ? p.d_in : p.B[slice].rows;
    T* out = static_cast<T*>(of_A ? p.dA[slice] : p.dB[slice]);
    if (out == nullptr || first_column >= columns) continue;

    const int rank = rank_of(r, static_cast<int>(slot)), begin = start_of(r, slot);
    const int end = first_rank < rank ? start_of(r, slot + 1) : begin;
    float* factors = of_A ? p.dh : p.h;
    const T* rows = of_A ? static_cast<const T*>(p.x) : static_cast<const T*>(p.dy) + first_column_of(p.B, slice);
    const int64_t stride = of_A ? p.x_stride : p.dy_stride;
    if (begin >= end) {
      T* to = out + (of_A ? (slot * r.r_max + first_rank) * columns + first_column
                          : (slot * columns + first_column) * r.r_max + first_rank);
      const int ranks = static_cast<int>(min(r.r_max - first_rank, int64_t{kRanks}));
      const int width = static_cast<int>(min(columns - first_column, int64_t{kOuterColumns}));
      of_A ? clear(to, ranks, width, columns) : clear(to, width, ranks, r.r_max);
      continue;
    }
    Transfer<float, kDepth, kRanks> left;
    Transfer<T, kDepth, kOuterColumns> right;
    const int thread = static_cast<int>(threadIdx.x);
    const auto row_after = [&](int64_t position) {
      if (position + thread >= end) return Row{-1, 0};
      const int pair = pair_at(r, position + thread);
      return Row{pair, static_cast<int>(split(r, pair).token)};
    };
    const auto load = [&](const Row* of) {
      left.load([&](int row, int column) -> Span<float> {
        const int pair = of[row].pair;
        return {pair < 0 ? nullptr : factors_of(p, factors, slice, pair), first_rank + column, rank};
      });
      right.load([&](int row, int column) -> Span<T> {
        return {of[row].pair < 0 ? nullptr : rows + of[row].token * stride, first_column + column, columns};
      });
    };
    Tiles product;
    if (thread < kDepth) {
      shared.next_rows[0][thread] = row_after(begin);
      shared.next_rows[1][thread] = row_after(int64_t{begin} + kDepth);
    }
    __syncthreads();
    load(shared.next_rows[0]);
    int turn = 0;
    for (int64_t depth = begin; depth < end; depth += kDepth, turn ^= 1) {
      left.template store<Tiles::kLeftStride>(shared.tiles.left);
      right.template store<Tiles::kRightStride>(shared.tiles.right);
      __syncthreads();
      Row later;
      if (thread < kDepth) later = row_after(depth + 2 * kDepth);
      load(shared.next_rows[turn ^ 1]);
      product.add(shared.tiles, static_cast<int>(min(end - depth, int64_t{kDepth})));
      if (thread < kDepth) shared.next_rows[turn][thread] = later;
      __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t row = first_rank + Tiles::row(i);
      if (row >= r.r_max) continue;
#pragma unroll
      for (int j = 0; j < Tiles::kColumnsPerLane; j += 2) {
        const int64_t column = first_column + Tiles::column(j), live = columns - column;
        if (live <= 0) continue;
        // x and dy times the zeros of a rank that the slot does not have may be NaN.
        const float value = row < rank ? product.at(i, j) : 0.0f, next = row < rank ? product.at(i, j + 1) : 0.0f;
        if (of_A) {
          store_pair(out + (slot * r.r_max + row) * columns + column, value, next, live);
        } else {
          T* to = out + (slot * columns + column) * r.r_max + row;
          to[0] = from_float<T>(value);
          if (live > 1) to[r.r_max] = from_float<T>(next);
        }
      }
    }
  }
}

}  // namespace lorakern::cuda
