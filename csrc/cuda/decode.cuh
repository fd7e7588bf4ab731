// bgmv in one launch for few tokens to a slot: 16-bit elements, all rows of which lie in chunks of 16 bytes.
//
// The products and the order of their sums are those of lora.cuh, which serves every other call: a token's bits are the
// same from both. What differs is who does them. Each warp has a ring of tiles of its own and waits for nobody while it
// works through them: first its parts of d_in times a tile of 16 ranks, then its tiles of columns of y. The blocks of a
// cluster meet once in between, when each has sent its sums to all; every block then adds them up for itself.
//
// A launch is as long as its instructions are many: a warp runs through most of them once, and so few warps share a
// multiprocessor that nothing hides them. Addresses are therefore kept and moved on rather than computed.
#pragma once
#include "lora.cuh"

namespace lorakern::cuda {

// R: ranks, rounded up to 16, 32 or 64.
template <int R>
struct DecodeShape {
  static constexpr int kTokens = 8;
  static constexpr int kStages = 6;
  static constexpr int kDepth = 64;                    // columns of d_in in one tile
  static constexpr int kColumns = 1024 / R;            // of y, in one tile
  static constexpr int kRankTiles = R / 16;            // a warp has one of them
  static constexpr int kSide = kWarps / kRankTiles;    // parts of d_in side by side
  static constexpr int kWeightBytes = 2048;            // of A or B in one tile
  static constexpr int kRowBytes = 2 * kColumns + 16;  // of y, padded against bank conflicts
  static constexpr int kStageBytes = 3200;             // with x, 8 x 128, or y, 8 x kRowBytes
  static constexpr int kStride = R + 8;                // of h, from token to token
  static_assert(kWeightBytes + kTokens * kRowBytes <= kStageBytes, "x and y fit behind the weights");
};

// Values that an element of h is the sum of: one per quarter where a warp has all parts of it, else one per part.
inline __host__ __device__ constexpr int decode_values(int ranks, int blocks) {
  return ranks == 64 && blocks <= kParts / kQuarter ? kParts / kQuarter : kParts;
}

// Dynamic shared memory: the rings of the warps, what the group receives, h.
inline int decode_bytes(int64_t r_max, int blocks) {
  using S = DecodeShape<16>;
  int received = 0;
  for (int ranks = 16; ranks <= padded_rank(r_max); ranks *= 2) {
    received = std::max(received, decode_values(ranks, blocks) * ranks * S::kTokens);
  }
  const int h = S::kTokens * (padded_rank(r_max) + 8);
  return kWarps * S::kStages * S::kStageBytes + (received + h) * static_cast<int>(sizeof(float));
}

// The tiles of A and x that a warp multiplies, one after the other. A lane copies chunk lane % 8 of every fourth row.
template <typename T, int R>
struct ShrinkTiles {
  using S = DecodeShape<R>;
  const T *a, *x[2];  // its first row of the rank tile; of its two tokens. At the first column of d_in
  int64_t four_rows;
  int ranks, tokens;  // that are there, from its first row on
  int place[2];       // of its chunk of its first and second row in a tile
  int column, left;   // of the tile; columns from this lane's on that the part still has
  int d_in, part, pieces, first_part, parts;
  int own, piece = 0;

  __device__ ShrinkTiles(const BgmvParams& p, const Group& group, const Members<8>& members, int blocks) {
    const int warp = threadIdx.x / kWarp, row = threadIdx.x % kWarp / 8, chunk = threadIdx.x % 8;
    const Weight& A = p.A[blockIdx.z];
    const int first_rank = warp % S::kRankTiles * 16;
    a = static_cast<const T*>(A.data) + group.slot * A.slot_stride + (first_rank + row) * A.row_stride + chunk * 8;
    four_rows = 4 * A.row_stride;
    ranks = group.rank - first_rank - row;
    tokens = group.count - row;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      x[i] = static_cast<const T*>(p.x) + (4 * i < tokens ? members.token[row + 4 * i] * p.x_stride : 0) + chunk * 8;
      place[i] = Tile<T, S::kDepth>::offset(row + 4 * i, chunk);
    }
    d_in = static_cast<int>(p.d_in);
    part = static_cast<int>(part_length(p.d_in));
    pieces = (part + S::kDepth - 1) / S::kDepth;
    parts = kParts / blocks;
    first_part = blockIdx.x % blocks * parts;
    own = warp / S::kRankTiles;
    begin_part();
  }

  __device__ void begin_part() {
    column = (first_part + own) * part;
    left = min(part, d_in - column) - static_cast<int>(threadIdx.x % 8 * 8);
  }

  __device__ int count() const { return own < parts ? (parts - own + S::kSide - 1) / S::kSide * pieces : 0; }

  __device__ __forceinline__ void load(Shared stage) {
    const int bytes = left > 0 ? 16 : 0;
    const T* from = a + column;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (4 * i < ranks) copy_async(stage + place[i % 2] + i / 2 * 1024, from, bytes);
      from += four_rows;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (4 * i < tokens) copy_async(stage + place[i] + S::kWeightBytes, x[i] + column, bytes);
    }
    column += S::kDepth;
    left -= S::kDepth;
    if (++piece < pieces) return;
    piece = 0;
    own += S::kSide;
    begin_part();
  }
};

// The tiles of B and y that a warp multiplies, one after the other. A lane copies chunk lane % kChunks of every
// kStep-th row of B, and one or two chunks of y.
template <typename T, int R>
struct ExpandTiles {
  using S = DecodeShape<R>;
  static constexpr int kChunks = R / 8, kStep = kWarp / kChunks;
  static constexpr int kYChunks = S::kColumns / 8;  // of a token in one tile
  static constexpr int kYEach = S::kTokens * kYChunks > kWarp ? 2 : 1;
  const T* b;          // its first row of the next tile to load
  int64_t rows, next;  // from row to row, from tile to tile, in elements
  int bytes;           // of its chunk of B that are there
  int place[2];        // of its chunk of its first and second row in a tile
  T* y[kYEach];        // its chunks in the first tile of all
  int y_place[kYEach];
  int tokens, columns, column, step;  // column: the first of the next tile to load
  bool accumulate;

  __device__ ExpandTiles(const BgmvParams& p, const Group& group, const Members<8>& members, int blocks) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, row = lane / kChunks, chunk = lane % kChunks;
    const Weight& B = p.B[blockIdx.z];
    columns = static_cast<int>(B.rows);
    column = (static_cast<int>(blockIdx.x % blocks) * kWarps + warp) * S::kColumns;
    step = blocks * kWarps * S::kColumns;
    rows = kStep * B.row_stride;
    next = step * B.row_stride;
    b = static_cast<const T*>(B.data) + group.slot * B.slot_stride + (column + row) * B.row_stride + chunk * 8;
    bytes = min(max(group.rank - chunk * 8, 0), 8) * 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) place[i] = Tile<T, R>::offset(row + i * kStep, chunk);
    tokens = group.count;
    accumulate = p.accumulate;
#pragma unroll
    for (int i = 0; i < kYEach; ++i) {
      const int token = token_of(i);
      y[i] = static_cast<T*>(p.y) + first_column_of(p.B, blockIdx.z) +
             (token < tokens ? members.token[token] * p.y_stride : 0) + y_chunk() * 8;
      y_place[i] = S::kWeightBytes + token * S::kRowBytes + y_chunk() * 16;
    }
  }

  static __device__ __forceinline__ int token_of(int i) {
    return static_cast<int>(threadIdx.x % kWarp) / kYChunks + i * (kWarp / kYChunks);
  }
  static __device__ __forceinline__ int y_chunk() { return threadIdx.x % kWarp % kYChunks; }

  __device__ __forceinline__ void load(Shared stage) {
    if (column >= columns) return;
    const int left = columns - column - static_cast<int>(threadIdx.x % kWarp) / kChunks;
    const T* from = b;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // rows that stand twice kStep apart are swizzled alike
      if (i * kStep < left) copy_async(stage + place[i % 2] + i / 2 * (2 * kStep * R * 2), from, bytes);
      from += rows;
    }
    if (accumulate) {
      const bool inside = column + y_chunk() * 8 < columns;
#pragma unroll
      for (int i = 0; i < kYEach; ++i) {
        if (inside && token_of(i) < tokens) copy_async(stage + y_place[i], y[i] + column, 16);
      }
    }
    b += next;
    column += step;
  }

  __device__ __forceinline__ void store(const char* tile, int first) const {
    if (first + y_chunk() * 8 >= columns) return;
#pragma unroll
    for (int i = 0; i < kYEach; ++i) {
      if (token_of(i) < tokens) {
        *reinterpret_cast<uint4*>(y[i] + first) = *reinterpret_cast<const uint4*>(tile + y_place[i]);
      }
    }
  }
};

template <typename T, int R>
struct DecodeBlock {
  using S = DecodeShape<R>;
  static constexpr int kRingBytes = S::kStages * S::kStageBytes;
  const Group& group;
  const Members<8>& members;
  uint64_t* arrivals;
  int blocks;
  float *received, *h;
  char* ring;
  Shared place;                  // of the ring
  int to_fill = 0, to_read = 0;  // bytes from its begin

  __device__ DecodeBlock(const Group& group, const Members<8>& members, uint64_t* arrivals, int blocks)
      : group(group), members(members), arrivals(arrivals), blocks(blocks) {
    ring = dynamic_shared() + threadIdx.x / kWarp * kRingBytes;
    place = shared_place(ring);
    received = reinterpret_cast<float*>(dynamic_shared() + kWarps * kRingBytes);
    h = received + decode_values(R, blocks) * R * S::kTokens;
  }

  static __device__ __forceinline__ int advance(int& at) { return next_stage<S::kStages, S::kStageBytes>(at); }

  // The oldest tile of the ring, which all lanes see. Nobody reads the one before it any more.
  __device__ __forceinline__ int next() {
    wait_copies<S::kStages - 2>();
    __syncwarp();
    return advance(to_read);
  }

  __device__ __forceinline__ void run(const BgmvParams& p) {
    // a lane sends two sums of 2 x 8 ranks, for each two tokens
    if (blocks > 1 && threadIdx.x == 0)
      expect_bytes(arrivals, decode_values(R, blocks) * R * ((group.count + 1) / 2) * 8);
    ExpandTiles<T, R> tiles(p, group, members, blocks);
    const int first = tiles.column;
    shrink(p, tiles);
    if (blocks > 1) {
      await_bytes(arrivals);
    } else {
      __syncthreads();
    }
    add_up();
    __syncthreads();
    expand(tiles, first);
    wait_copies<0>();
  }

  // Begins with the loads of the first tiles, ends with those of the first tiles of expand under way.
  __device__ __forceinline__ void shrink(const BgmvParams& p, ExpandTiles<T, R>& expand_ahead) {
    ShrinkTiles<T, R> ahead(p, group, members, blocks);
    const bool quarters = decode_values(R, blocks) == kParts / kQuarter;
    const int count = ahead.count(), pieces = ahead.pieces;
    int part = ahead.first_part + ahead.own, piece = 0;
    Sums<1> sums, quarter;
#pragma unroll 1
    for (int i = 1 - S::kStages; i < count; ++i) {
      const int at = i < 0 ? 0 : next();
      if (i + S::kStages - 1 < count) {
        ahead.load(place + advance(to_fill));
      } else {
        expand_ahead.load(place + advance(to_fill));
      }
      commit_copies();
      if (i == -1 && blocks > 1) cluster_meet();  // all have begun and expect what they are sent
      if (i < 0) continue;

      if (piece == 0) set_zero<1>(sums);
      multiply_tiles<1, S::kDepth, T>(sums, ring + at, 0, ring + at + S::kWeightBytes, 0);
      if (++piece < pieces) continue;
      piece = 0;
      if (quarters) {
        add<1>(quarter, sums, part % kQuarter == 0);
        if (part % kQuarter == kQuarter - 1) send(quarter, part / kQuarter);
      } else {
        send(sums, part);
      }
      part += S::kSide;
    }
  }

  // Value `index` of those that h is the sum of, to all blocks.
  __device__ __forceinline__ void send(const Sums<1>& sums, int index) {
    const int lane = threadIdx.x % kWarp, rank = threadIdx.x / kWarp % S::kRankTiles * 16 + lane / 4;
    if (lane % 4 * 2 >= group.count) return;
    float2* upper = reinterpret_cast<float2*>(received + (index * R + rank) * S::kTokens + lane % 4 * 2);
    float2* lower = upper + 8 * S::kTokens / 2;
    if (blocks == 1) {
      *upper = {sums[0][0], sums[0][1]};
      *lower = {sums[0][2], sums[0][3]};
      return;
    }
#pragma unroll 1
    for (int other = 0; other < blocks; ++other) {
      send_to(other, upper, {sums[0][0], sums[0][1]}, arrivals);
      send_to(other, lower, {sums[0][2], sums[0][3]}, arrivals);
    }
  }

  __device__ __forceinline__ void add_up() {
    const bool parts = decode_values(R, blocks) == kParts;
#pragma unroll
    for (int first = 0; first < R * S::kTokens; first += kThreads) {
      const int e = first + threadIdx.x, rank = e / S::kTokens;
      auto value = [&](int i) { return received[i * R * S::kTokens + e]; };
      auto four = [&](int i) { return value(i) + value(i + 1) + value(i + 2) + value(i + 3); };
      const float sum = parts ? four(0) + four(4) + four(8) + four(12) : four(0);
      h[e % S::kTokens * S::kStride + rank] = rank < group.rank ? __uint_as_float(round_tf32(sum)) : 0.0f;
    }
  }

  // Tokens that are not there are computed as well, from whatever lies there: only what is stored needs a condition.
  __device__ __forceinline__ void expand(ExpandTiles<T, R>& tiles, int column) {
    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    const float factors[2] = {members.factor[2 * t], members.factor[2 * t + 1]};
    const bool accumulate = tiles.accumulate;
#pragma unroll 1
    for (; column < tiles.columns; column += tiles.step) {
      char* tile = ring + next();
      tiles.load(place + advance(to_fill));
      commit_copies();
      char* rows = tile + S::kWeightBytes + 2 * t * S::kRowBytes + g * 2;
#pragma unroll
      for (int m = 0; m < S::kColumns; m += 16) {
        Sums<1> sums;
        set_zero<1>(sums);
        multiply_h<1, R, true, T>(sums, tile, m, h, S::kStride);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          T& y = *reinterpret_cast<T*>(rows + e % 2 * S::kRowBytes + (m + e / 2 * 8) * 2);
          const float factor = factors[e % 2];
          y = from_float<T>(accumulate ? fmaf(factor, sums[0][e], to_float(y)) : factor * sums[0][e]);
        }
      }
      __syncwarp();
      tiles.store(tile, column);
    }
  }
};

// blockIdx.x: the blocks of a group (a cluster) side by side, group after group; blockIdx.z: the slice.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2) decode(const __grid_constant__ BgmvParams p, int blocks, int step) {
  __shared__ Members<8> members;
  __shared__ uint64_t arrivals;
  const Group group = find_group<8>(p.routing, blockIdx.x / blocks, step, members);
  if (group.count == 0) return;
  __syncthreads();
  if (group.rank <= 16) {
    DecodeBlock<T, 16>(group, members, &arrivals, blocks).run(p);
  } else if (group.rank <= 32) {
    DecodeBlock<T, 32>(group, members, &arrivals, blocks).run(p);
  } else {
    DecodeBlock<T, 64>(group, members, &arrivals, blocks).run(p);
  }
}

}  // namespace lorakern::cuda
