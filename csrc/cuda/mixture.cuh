// expand for tokens with several choices: y[t] (+)= sum_k gates[t, k] * scale[i] * B[i] h[t, k], i = indices[t, k].
//
// A block has N neighbouring tokens and 64 columns of a slice. It takes the slots among its tokens one after the other,
// in ascending order: B once for all tokens, and the product is added, in float32, to the tokens that have the slot and
// to no other. So a token's terms have one order, whatever its neighbours are, and y is rounded once.
#pragma once
#include "lora.cuh"

namespace lorakern::cuda {

template <typename T, int N>
struct MixtureShape {
  static constexpr int kStages = 4;
  static constexpr int kColumns = 64;
  static constexpr int kHStride = kRankTile + 8;
  static constexpr int kBBytes = kColumns * kRankTile * sizeof(T);
  static constexpr int kStageBytes = kBBytes + N * kHStride * sizeof(float);
  using Y = YTile<T, kColumns>;

  // Dynamic shared memory: stages, y, the key and the factor of every pair.
  static int64_t bytes(int64_t choices) {
    return kStages * kStageBytes + N * Y::kRowBytes + N * choices * (sizeof(int64_t) + sizeof(float));
  }
};

// A slot and its rank in one number, ordered by slot. kNoKey: a pair without an adapter, or of rank 0.
constexpr int64_t kNoKey = INT64_MAX;

template <typename T, int N>
struct MixtureBlock {
  using S = MixtureShape<T, N>;
  using Y = typename S::Y;

  const BgmvParams& p;
  const int slice, choices;
  const int64_t first_token, first_column;
  const int tokens;
  char* stages;
  char* y_tile;
  int64_t* keys;
  float* factors;
  T* y;

  struct Cursor {  // one tile of ranks of one slot
    int64_t key;
    int tile;
    __device__ int slot() const { return static_cast<int>(key >> 32); }
    __device__ int rank() const { return static_cast<int>(key & 0xffffffff) - tile * kRankTile; }  // from the tile on
    __device__ bool is_last() const { return rank() <= kRankTile; }
  };

  __device__ MixtureBlock(const BgmvParams& p, int64_t first_token, int64_t first_column)
      : p(p),
        slice(blockIdx.z),
        choices(static_cast<int>(p.routing.num_choices)),
        first_token(first_token),
        first_column(first_column),
        tokens(static_cast<int>(min(int64_t{N}, p.routing.num_tokens - first_token))),
        stages(dynamic_shared()),
        y_tile(stages + S::kStages * S::kStageBytes),
        keys(reinterpret_cast<int64_t*>(y_tile + N * Y::kRowBytes)),
        factors(reinterpret_cast<float*>(keys + N * choices)),
        y(static_cast<T*>(p.y) + first_column_of(p.B, slice) + first_column) {}

  __device__ int columns() const { return capped(p.B[slice].rows - first_column); }
  __device__ char* stage(int i) { return stages + i % S::kStages * S::kStageBytes; }

  __device__ void route() {
    for (int i = threadIdx.x; i < tokens * choices; i += kThreads) {
      const int64_t pair = first_token * choices + i;
      const int slot = slot_of(p.routing, pair), rank = rank_of(p.routing, slot);
      keys[i] = rank > 0 ? int64_t{slot} << 32 | rank : kNoKey;
      factors[i] = rank > 0 ? gate_of(p.routing, pair) * scale_of(p.routing, slot) : 0.0f;
    }
    __syncthreads();
  }

  // The smallest key over `key`, found by every warp for itself.
  __device__ int64_t key_after(int64_t key) const {
    long long next = kNoKey;
    for (int i = threadIdx.x % kWarp; i < tokens * choices; i += kWarp) {
      if (keys[i] > key && keys[i] < next) next = keys[i];
    }
#pragma unroll
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
      const long long other = __shfl_xor_sync(0xffffffffu, next, lanes);
      if (other < next) next = other;
    }
    return next;
  }

  __device__ Cursor after(Cursor c) const {
    return c.is_last() ? Cursor{key_after(c.key), 0} : Cursor{c.key, c.tile + 1};
  }

  // The first choice of the token that has this key, or -1.
  __device__ int choice_of(int token, int64_t key) const {
    for (int k = 0; k < choices; ++k) {
      if (keys[token * choices + k] == key) return k;
    }
    return -1;
  }

  __device__ bool is_served(int token) const {
    bool served = false;
    for (int k = 0; k < choices; ++k) served |= keys[token * choices + k] != kNoKey;
    return served;
  }

  // Begins the loads of stage i: B and h of a cursor, zeros in h where a token has another slot.
  __device__ void load(int i, Cursor c) {
    if (c.key != kNoKey) {
      const Weight& B = p.B[slice];
      const T* b = static_cast<const T*>(B.data) + c.slot() * B.slot_stride;
      const int ranks = c.rank();
      load_matrix<T, kRankTile, 1, S::kColumns, kThreads>(stage(i), in_chunks(b, B.row_stride),
                                                          b + first_column * B.row_stride + c.tile * kRankTile, 1, 0,
                                                          B.row_stride, columns(), [=](int) { return ranks; });
      char* to = stage(i) + S::kBBytes;
      constexpr int kChunks = kRankTile / 4;
      const Planes h = planes_of_slice(p, slice);
      const bool aligned = in_chunks(h.first, h.r_max);
      for (int j = threadIdx.x; j < N * kChunks; j += kThreads) {
        const int token = j / kChunks, chunk = j % kChunks;
        const int choice = token < tokens ? choice_of(token, c.key) : -1;
        Run<float> run = {p.h, choice < 0 ? 0 : c.rank() - 4 * chunk};
        if (run.count > 0) {
          const int64_t pair = (first_token + token) * choices + choice;
          run.data = h.row(0, pair) + c.tile * kRankTile + 4 * chunk;
        }
        char* place = to + (token * S::kHStride + 4 * chunk) * sizeof(float);
        if (p.num_planes == 1) {
          load_chunk(place, run, aligned);
        } else {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int64_t pair = (first_token + token) * choices + choice;
            const int rank = c.tile * kRankTile + 4 * chunk + e;
            reinterpret_cast<float*>(place)[e] = e < run.count ? h.sum(pair, rank) : 0.0f;
          }
        }
      }
    }
    commit_copies();
  }

  __device__ void run() {
    route();
    const bool y_aligned = in_chunks(y, p.y_stride);
    if (p.accumulate) {
      Y::load(y_tile, tokens, y_aligned, [&](int token) -> Run<T> {
        return {y + (first_token + token) * p.y_stride, is_served(token) ? columns() : 0};
      });
    }
    constexpr int kTiles = N / 8;
    const int warp = threadIdx.x / kWarp, g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
    Sums<kTiles> sums, totals;
    set_zero<kTiles>(totals);
    Cursor ahead = {key_after(-1), 0};
#pragma unroll
    for (int i = 0; i < S::kStages - 1; ++i) {
      load(i, ahead);
      if (ahead.key != kNoKey) ahead = after(ahead);
    }
    Cursor now = {key_after(-1), 0};
    for (int i = 0; now.key != kNoKey; ++i, now = after(now)) {
      wait_copies<S::kStages - 2>();
      __syncthreads();
      load(i + S::kStages - 1, ahead);
      if (ahead.key != kNoKey) ahead = after(ahead);
      if (now.tile == 0) set_zero<kTiles>(sums);
      char* from = stage(i);
      multiply_h<kTiles, kRankTile, false, T>(sums, from, warp * 16, reinterpret_cast<const float*>(from + S::kBBytes),
                                              S::kHStride, (min(now.rank(), kRankTile) + 15) / 16);
      if (!now.is_last()) continue;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          const int token = tile * 8 + 2 * t + side;
          if (token >= tokens) continue;
          for (int k = 0; k < choices; ++k) {
            if (keys[token * choices + k] != now.key) continue;
            const float factor = factors[token * choices + k];
            totals[tile][side] = fmaf(factor, sums[tile][side], totals[tile][side]);
            totals[tile][side + 2] = fmaf(factor, sums[tile][side + 2], totals[tile][side + 2]);
          }
        }
      }
    }
    wait_copies<0>();
    __syncthreads();
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int token = tile * 8 + 2 * t + e % 2;
        if (token >= tokens) continue;
        T& place = Y::at(y_tile, token, warp * 16 + g + e / 2 * 8);
        place = from_float<T>(p.accumulate ? to_float(place) + totals[tile][e] : totals[tile][e]);
      }
    }
    __syncwarp();
    Y::template store<16>(y_tile, warp * 16, tokens, y_aligned, [&](int token) -> RunOut<T> {
      return {y + (first_token + token) * p.y_stride + warp * 16, is_served(token) ? columns() - warp * 16 : 0};
    });
  }
};

// blockIdx.x: N tokens, blockIdx.y: 64 columns of slice blockIdx.z.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads, N <= 16 ? 4 : 3) mixture(const __grid_constant__ BgmvParams p) {
  const int64_t first_column = int64_t{blockIdx.y} * MixtureShape<T, N>::kColumns;
  if (first_column >= p.B[blockIdx.z].rows) return;
  MixtureBlock<T, N>(p, int64_t{blockIdx.x} * N, first_column).run();
}

}  // namespace lorakern::cuda
