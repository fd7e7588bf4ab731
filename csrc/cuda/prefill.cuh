// bgmv in one launch for many tokens to a slot: 16-bit elements, all rows of which lie in chunks of 16 bytes.
//
// The products and the order of their sums are those of lora.cuh, which serves every other call: a token's bits are the
// same from both. Here the tokens are the rows of a product: a warp has 16 of them, and what it holds of h when its
// shrink is done is, as it lies in its registers, the left factor of its expand. The tiles of A and B come through a
// pipeline that all warps share; x and y are a warp's own.
//
// Several blocks to a group are a cluster. Each takes as many quarters of d_in, sends their sums to the others, and
// takes the tiles of columns in turns; a lane finds the sums of the other blocks under its own number.
#pragma once
#include "lora.cuh"

namespace lorakern::cuda {

// R: ranks, rounded up to 16, 32 or 64.
template <int R>
struct PrefillShape {
  static constexpr int kTokens = 16 * kWarps;
  static constexpr int kStages = 4;
  static constexpr int kColumns = 64;                        // of d_in, and of y, in one stage
  static constexpr int kWeightBytes = 64 * kColumns * 2;     // of A or B in one stage, at most
  static constexpr int kRowsBytes = kTokens * kColumns * 2;  // of x or y
  static constexpr int kStageBytes = kWeightBytes + kRowsBytes;
  static constexpr int kRankTiles = R / 8;
  static constexpr int kSums = R / 2;  // a lane's sums: 16 tokens times R ranks to a warp
};

// Blocks to a group share the quarters of d_in; what they send is a float2 for each two sums of a lane.
constexpr int kQuarters = kParts / kQuarter;
constexpr int kPrefillBlocks = kQuarters;

inline int prefill_bytes(int64_t r_max, int blocks) {
  using S = PrefillShape<16>;
  const int received = (kQuarters - kQuarters / blocks) * S::kTokens * padded_rank(r_max);
  return S::kStages * S::kStageBytes + received * static_cast<int>(sizeof(float));
}

template <typename T, int R>
struct PrefillBlock {
  using S = PrefillShape<R>;
  using Rows = Tile<T, S::kColumns>;  // of x, A and y
  using Weights = Tile<T, R>;         // of B
  static constexpr int kBChunks = R / 8;
  using H = Sums<S::kRankTiles>;

  static constexpr int kRing = S::kStages * S::kStageBytes;
  static constexpr int kARows = kThreads / 8, kBRows = kThreads / kBChunks;  // that are copied at a time

  const BgmvParams& p;
  const Group& group;
  const Members<S::kTokens>& members;
  uint64_t* arrivals;
  int blocks, block, columns;
  Shared ring;
  int to_fill = 0, to_read = 0;  // bytes from its begin
  const T *a, *b;                // this thread's first chunk of a stage, of the slot's first column and row
  int64_t a_rows, b_row, b_rows;
  const T* x[4];  // its chunks of x, of the first column
  T* y[2];        // the rows of its two tokens

  __device__ PrefillBlock(const BgmvParams& p, const Group& group, const Members<S::kTokens>& members,
                          uint64_t* arrivals, int blocks)
      : p(p), group(group), members(members), arrivals(arrivals), blocks(blocks), block(blockIdx.x % blocks) {
    const Weight &A = p.A[blockIdx.z], &B = p.B[blockIdx.z];
    columns = static_cast<int>(B.rows);
    ring = shared_place(dynamic_shared());
    a = static_cast<const T*>(A.data) + group.slot * A.slot_stride + threadIdx.x / 8 * A.row_stride + chunk() * 8;
    a_rows = kARows * A.row_stride;
    b = static_cast<const T*>(B.data) + group.slot * B.slot_stride + threadIdx.x / kBChunks * B.row_stride +
        threadIdx.x % kBChunks * 8;
    b_row = B.row_stride;
    b_rows = kBRows * B.row_stride;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[i] = static_cast<const T*>(p.x) + chunk() * 8;
      if (x_row(i) < group.count) x[i] += members.token[x_row(i)] * p.x_stride;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      y[i] = static_cast<T*>(p.y) + first_column_of(p.B, blockIdx.z);
      if (y_row(i) < group.count) y[i] += members.token[y_row(i)] * p.y_stride;
    }
  }

  static __device__ __forceinline__ int warp() { return threadIdx.x / kWarp; }
  static __device__ __forceinline__ int lane() { return threadIdx.x % kWarp; }
  static __device__ __forceinline__ int chunk() { return threadIdx.x % 8; }
  static __device__ __forceinline__ int x_row(int i) { return warp() * 16 + i * 4 + lane() / 8; }
  static __device__ __forceinline__ int y_row(int i) { return warp() * 16 + i * 8 + lane() / 4; }

  static __device__ __forceinline__ int advance(int& at) { return next_stage<S::kStages, S::kStageBytes>(at); }

  // The oldest stage, which all threads see. Nobody reads the one before it any more.
  __device__ __forceinline__ int next() {
    wait_copies<S::kStages - 2>();
    __syncthreads();
    return advance(to_read);
  }

  // `left` columns of A and x from `first` on.
  __device__ __forceinline__ void load_shrink(int first, int left) {
    const Shared stage = ring + advance(to_fill);
    const int bytes = left > chunk() * 8 ? 16 : 0;
    const T* from = a + first;
#pragma unroll
    for (int i = 0; i < R; i += kARows) {
      const int row = i + threadIdx.x / 8;
      if (row < group.rank) copy_async(stage + Rows::offset(row, chunk()), from, bytes);
      from += a_rows;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (x_row(i) < group.count) {
        copy_async(stage + S::kWeightBytes + Rows::offset(x_row(i), chunk()), x[i] + first, bytes);
      }
    }
  }

  // A lane's columns of y, eight side by side in each half of a tile, stand apart in the products: as column
  // 8 t + 2 n + i of a half is column 2 t + i of its n-th product, row 8 n + 2 t + i of the tile holds it.
  static __device__ __forceinline__ int row_of(int column) {
    return column / 32 * 32 + column % 8 / 2 * 8 + column % 32 / 8 * 2 + column % 2;
  }

  // Calls function(token of two, half of the tile, offset in a stage) for the four chunks of y that this lane has.
  template <typename Function>
  __device__ __forceinline__ void each_chunk(int column, Function function) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int chunk = half * 4 + lane() % 4;
        if (y_row(i) < group.count && column + chunk * 8 < columns) {
          function(i, half, S::kWeightBytes + Rows::offset(y_row(i), chunk), y[i] + column + chunk * 8);
        }
      }
    }
  }

  __device__ __forceinline__ void load_expand(int& column) {
    const Shared stage = ring + advance(to_fill);
    if (column >= columns) return;
    const int bytes = min(max(group.rank - static_cast<int>(threadIdx.x % kBChunks) * 8, 0), 8) * 2;
    const T* from = b + column * b_row;
#pragma unroll
    for (int i = 0; i < S::kColumns; i += kBRows) {
      const int row = i + threadIdx.x / kBChunks;
      if (column + row < columns) {
        copy_async(stage + Weights::offset(row_of(row), threadIdx.x % kBChunks), from, bytes);
      }
      from += b_rows;
    }
    if (p.accumulate) {
      each_chunk(column, [&](int, int, int offset, const T* from) { copy_async(stage + offset, from, 16); });
    }
    column += blocks * S::kColumns;
  }

  __device__ __forceinline__ void run() {
    constexpr int kBytes = S::kSums * kThreads * static_cast<int>(sizeof(float));  // of a quarter
    if (blocks > 1 && threadIdx.x == 0) expect_bytes(arrivals, (kQuarters - kQuarters / blocks) * kBytes);
    int ahead = block * S::kColumns;
    H h;
    shrink(h, ahead);
    expand(h, ahead);
    wait_copies<0>();
  }

  // Begins with the loads of the first stages, ends with those of the first stages of expand under way.
  __device__ __forceinline__ void shrink(H& h, int& expand_ahead) {
    const int d_in = static_cast<int>(p.d_in), part = static_cast<int>(part_length(p.d_in));
    const int pieces = (part + S::kColumns - 1) / S::kColumns, parts = kParts / blocks, count = parts * pieces;
    int ahead_part = block * parts, ahead_piece = 0, now_part = block * parts, now_piece = 0;
    H sums, quarter, first;  // h: of one block the sum so far, else the last quarter; first: the one before it
#pragma unroll 1
    for (int i = 1 - S::kStages; i < count; ++i) {
      const int stage = i < 0 ? 0 : next();
      if (i + S::kStages - 1 < count) {
        const int first = ahead_part * part + ahead_piece * S::kColumns;
        load_shrink(first, min(part - ahead_piece * S::kColumns, d_in - first));
        if (++ahead_piece == pieces) ahead_piece = 0, ++ahead_part;
      } else {
        load_expand(expand_ahead);
      }
      commit_copies();
      if (i == -1 && blocks > 1) cluster_meet();  // all have begun and expect what they are sent
      if (i < 0) continue;

      if (now_piece == 0) set_zero<S::kRankTiles>(sums);
      multiply_x(sums, ring + stage);
      if (++now_piece < pieces) continue;
      now_piece = 0;
      add<S::kRankTiles>(quarter, sums, now_part % kQuarter == 0);
      if (++now_part % kQuarter != 0) continue;
      if (blocks == 1) {
        add<S::kRankTiles>(h, quarter, now_part == kQuarter);
      } else {
        send(quarter, now_part / kQuarter - 1);
        copy(first, h);
        copy(h, quarter);
      }
    }
    if (blocks > 1) {
      await_bytes(arrivals);
      add_up(h, first);
    }
#pragma unroll
    for (int n = 0; n < S::kRankTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int rank = 8 * n + lane() % 4 * 2 + e % 2;
        h[n][e] = rank < group.rank ? __uint_as_float(round_tf32(h[n][e])) : 0.0f;
      }
    }
  }

  static __device__ __forceinline__ void copy(H& to, const H& from) { add<S::kRankTiles>(to, from, true); }

  // Where a lane's sums of a quarter that block `to` does not have itself are, two at a time, kThreads apart.
  __device__ __forceinline__ float2* received(int to, int quarter) const {
    const int own = kQuarters / blocks, place = quarter < to * own ? quarter : quarter - own;
    float2* first = reinterpret_cast<float2*>(dynamic_shared() + kRing);
    return first + place * (S::kSums / 2) * kThreads + threadIdx.x;
  }

  __device__ __forceinline__ void send(const H& sums, int quarter) const {
#pragma unroll 1
    for (int other = 0; other < blocks; ++other) {
      if (other == block) continue;
      float2* to = received(other, quarter);
#pragma unroll
      for (int i = 0; i < S::kSums / 2; ++i) {
        send_to(other, to + i * kThreads, {sums[i / 2][i % 2 * 2], sums[i / 2][i % 2 * 2 + 1]}, arrivals);
      }
    }
  }

  // h: this block's last quarter on entry, the sum of all on return; first: the one before it, where it has two.
  __device__ __forceinline__ void add_up(H& h, const H& first) const {
    const int own = kQuarters / blocks;
    H sum;
#pragma unroll
    for (int quarter = 0; quarter < kQuarters; ++quarter) {
      const bool is_own = quarter / own == block, is_last = quarter % own == own - 1;
      const float2* from = received(block, quarter);
#pragma unroll
      for (int i = 0; i < S::kSums / 2; ++i) {
        const int n = i / 2, e = i % 2 * 2;
        float2 value = is_last ? float2{h[n][e], h[n][e + 1]} : float2{first[n][e], first[n][e + 1]};
        if (!is_own) value = from[i * kThreads];
        sum[n][e] = quarter == 0 ? value.x : sum[n][e] + value.x;
        sum[n][e + 1] = quarter == 0 ? value.y : sum[n][e + 1] + value.y;
      }
    }
    copy(h, sum);
  }

  // sums += this warp's tokens times the rows of A.
  __device__ __forceinline__ void multiply_x(H& sums, Shared stage) const {
#pragma unroll 2
    for (int step = 0; step < S::kColumns / 16; ++step) {
      uint32_t tokens[4];
      load_matrices(tokens, stage + S::kWeightBytes + Rows::offset(warp() * 16 + lane() % 16, 2 * step + lane() / 16));
#pragma unroll
      for (int n = 0; n < S::kRankTiles; n += 2) {
        uint32_t ranks[4];
        load_matrices(ranks, stage + Rows::offset(8 * n + lane() % 8 + lane() / 16 * 8, 2 * step + lane() / 8 % 2));
        multiply<T>(sums[n], tokens, ranks[0], ranks[1]);
        multiply<T>(sums[n + 1], tokens, ranks[2], ranks[3]);
      }
    }
  }

  // sums[n] = h times the columns of the n-th product, four to each half of a tile.
  __device__ __forceinline__ void multiply_h(Sums<8>& sums, const H& h, Shared stage) const {
    set_zero<8>(sums);
#pragma unroll
    for (int step = 0; step < R / 16; ++step) {
#pragma unroll
      for (int n = 0; n < 8; n += 2) {
        uint32_t pairs[4];
        load_matrices(pairs, stage + Weights::offset(8 * n + lane() % 8 + lane() / 16 * 8, 2 * step + lane() / 8 % 2));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 weights = unpack<T>(pairs[i]);
          const float (&left)[4] = h[2 * step + i % 2];
          const uint32_t factors[4] = {__float_as_uint(left[0]), __float_as_uint(left[2]), __float_as_uint(left[1]),
                                       __float_as_uint(left[3])};
          multiply_tf32(sums[n + i / 2], factors, __float_as_uint(weights.x), __float_as_uint(weights.y));
        }
      }
    }
  }

  __device__ __forceinline__ void expand(const H& h, int& ahead) {
    float factors[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) factors[i] = y_row(i) < group.count ? members.factor[y_row(i)] : 0.0f;
#pragma unroll 1
    for (int column = block * S::kColumns; column < columns; column += blocks * S::kColumns) {
      const int stage = next();
      load_expand(ahead);
      commit_copies();
      Sums<8> sums;
      multiply_h(sums, h, ring + stage);
      each_chunk(column, [&](int i, int half, int offset, T* to) {
        uint4 chunk = {};
        if (p.accumulate) chunk = *reinterpret_cast<const uint4*>(dynamic_shared() + stage + offset);
        uint32_t* pairs = reinterpret_cast<uint32_t*>(&chunk);
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const float2 old = unpack<T>(pairs[n]);
          const float (&sum)[4] = sums[half * 4 + n];
          const float first = sum[i * 2], second = sum[i * 2 + 1], factor = factors[i];
          pairs[n] = p.accumulate ? pack<T>(fmaf(factor, first, old.x), fmaf(factor, second, old.y))
                                  : pack<T>(factor * first, factor * second);
        }
        *reinterpret_cast<uint4*>(to) = chunk;
      });
    }
  }
};

// blockIdx.x: the blocks of a group (a cluster) side by side, group after group; blockIdx.z: the slice.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2) prefill(const __grid_constant__ BgmvParams p, int blocks, int step) {
  __shared__ Members<64> members;
  __shared__ uint64_t arrivals;
  const Group group = find_group<64>(p.routing, blockIdx.x / blocks, step, members);
  if (group.count == 0) return;
  __syncthreads();
  if (group.rank <= 16) {
    PrefillBlock<T, 16>(p, group, members, &arrivals, blocks).run();
  } else if (group.rank <= 32) {
    PrefillBlock<T, 32>(p, group, members, &arrivals, blocks).run();
  } else {
    PrefillBlock<T, 64>(p, group, members, &arrivals, blocks).run();
  }
}

}  // namespace lorakern::cuda
