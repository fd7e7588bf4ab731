// shrink, expand, or both in one launch, for pairs grouped by slot; up to N pairs and one slice to a group.
//
//   shrink  h = A x   d_in is cut into kParts parts, which follow from d_in alone; each of a group's blocks, a power of
//                     two up to kParts, takes as many. A part is one chain of multiply-adds in one warp, and the parts
//                     are added as ((p0 + p1) + p2) + p3 and likewise four of those. So the bits of a token's h depend
//                     on nothing but its own x and A.
//   reduce            with several blocks to a group, those are a cluster: they send their sums to the block that owns
//                     a share of h, and that one sends the finished share to all, through shared memory.
//   expand  y += B h  the blocks take the tiles of columns in turns.
//
// One pipeline of kStages tiles runs through both halves: the first tiles of B are on their way while h is finished.
// Where there are no clusters and too few groups, shrink leaves its parts in planes of h, and a second launch adds them
// up in the same order and expands. Ranks are rounded up to 16, 32 or a multiple of 64, slot by slot; nothing beyond
// the true rank is read.
#pragma once
#include "group.cuh"
#include "tiles.cuh"

namespace lorakern::cuda {

constexpr int kParts = 16;     // of d_in
constexpr int kQuarter = 4;    // parts that are added first
constexpr int kRankTile = 64;  // ranks at a time where there are more
template <typename T>
constexpr int kDepth = 128 / sizeof(T);  // columns of a part in one stage

inline __host__ __device__ int64_t part_length(int64_t d_in) { return (d_in + kParts * 16 - 1) / (kParts * 16) * 16; }

inline __host__ __device__ constexpr int padded_rank(int64_t rank) {
  return rank <= 16 ? 16 : rank <= 32 ? 32 : static_cast<int>((rank + kRankTile - 1) / kRankTile * kRankTile);
}

// Floats from one token of h to the next: eight rows then begin in banks that two floats a lane do not meet twice.
inline __host__ __device__ constexpr int h_stride(int64_t r_max) { return padded_rank(r_max) + 8; }

// How the four warps share the work of a stage with tiles of R ranks.
template <typename T, int N, int R>
struct Shape {
  static constexpr int kDepth = cuda::kDepth<T>;
  static constexpr int kStages = N <= 16 && sizeof(T) == 2 ? 4 : 3;
  static constexpr int kRankWarps = R / 16;
  static constexpr int kGroups = N <= 16 ? kWarps / kRankWarps : 1;  // parts of d_in side by side
  static constexpr int kTokenWarps = kWarps / (kRankWarps * kGroups);
  static constexpr int kTokenTiles = N / 8 / kTokenWarps;   // of a warp, in shrink
  static constexpr int kColumns = N <= 16 ? 4096 / R : 64;  // of y, in one stage
  static constexpr int kWarpColumns = kColumns / kWarps;
  static constexpr int kABytes = kGroups * R * kDepth * sizeof(T);
  static constexpr int kXBytes = kGroups * N * kDepth * sizeof(T);
  static constexpr int kBBytes = kColumns * R * sizeof(T);
  static constexpr int kYBytes = N * YTile<T, kColumns>::kRowBytes;
  static constexpr int kShrinkBytes = kABytes + kXBytes, kExpandBytes = kBBytes + kYBytes;
  static constexpr int kStageBytes = kShrinkBytes > kExpandBytes ? kShrinkBytes : kExpandBytes;
};

// Values a share of h is added up from: one per part, or one per quarter where a block has whole quarters in one warp.
inline __host__ __device__ constexpr bool sends_parts(int tokens, int64_t blocks) {
  return tokens <= 16 || blocks > kParts / kQuarter;
}

// Where things lie in dynamic shared memory, in bytes: stages, then what the group receives, then h.
struct Layout {
  int received, h, total;
};

template <typename T, int N>
inline __host__ __device__ Layout layout_of(int64_t r_max, int64_t blocks) {
  int stages = Shape<T, N, 16>::kStages * Shape<T, N, 16>::kStageBytes;
  if (r_max > 16) stages = max(stages, Shape<T, N, 32>::kStages * Shape<T, N, 32>::kStageBytes);
  if (r_max > 32) stages = max(stages, Shape<T, N, 64>::kStages * Shape<T, N, 64>::kStageBytes);
  const int values = sends_parts(N, blocks) ? kParts : kParts / kQuarter;
  const int share = min(padded_rank(r_max), kRankTile) * N / static_cast<int>(blocks);
  const bool in_registers = blocks == 1 && N > 16;
  const int received = in_registers ? 0 : values * share * static_cast<int>(sizeof(float));
  return {stages, stages + received, stages + received + N * h_stride(r_max) * static_cast<int>(sizeof(float))};
}

// One slice of h in global memory: one plane, or kParts planes whose sum it is.
struct Planes {
  float* first;
  int64_t plane, r_max;  // elements from plane to plane and from pair to pair
  int count;

  __device__ __forceinline__ float* row(int i, int64_t pair) const { return first + i * plane + pair * r_max; }

  __device__ __forceinline__ float sum(int64_t pair, int rank) const {
    const float* at = row(0, pair) + rank;
    if (count == 1) return *at;
    float total = 0.0f;
#pragma unroll
    for (int quarter = 0; quarter < kParts / kQuarter; ++quarter) {
      float sum = at[quarter * kQuarter * plane];
#pragma unroll
      for (int i = 1; i < kQuarter; ++i) sum += at[(quarter * kQuarter + i) * plane];
      total = quarter == 0 ? sum : total + sum;
    }
    return total;
  }
};

__device__ __forceinline__ Planes planes_of_slice(const BgmvParams& p, int slice) {
  const int64_t pairs = pairs_of(p.routing), r_max = p.routing.r_max;
  return {p.h + slice * pairs * r_max, p.num_slices * pairs * r_max, r_max, p.num_planes};
}

// The work of a block on one group. It lies in shared memory, which all threads read, to keep their registers free.
template <typename T, int N, int R>
struct LoraBlock {
  using S = Shape<T, N, R>;
  using Y = YTile<T, S::kColumns>;
  static constexpr int kStages = S::kStages, kDepth = S::kDepth;

  Group group;
  const Members<N>* members;
  int blocks, block;
  bool shrinks, expands, accumulate;
  bool plane_sums;  // leave the parts in planes of h
  bool a_aligned, x_aligned, b_aligned, y_aligned;
  int received_at, h_at;  // in dynamic shared memory
  int log_share;          // of a block in a rank tile of h: a power of two
  int stride;             // of h in shared memory, in floats
  int part;               // columns of d_in in one part
  int own_parts, rounds, pieces;
  int64_t d_in, columns;  // of x, of this slice of y
  int64_t a_stride, x_stride, b_stride, y_stride;
  const T* a;
  const T* x;
  const T* b;
  T* y;
  Planes planes;

  // A part each by the first lane of the four warps.
  __device__ void set(const BgmvParams& p, const Group& g, const Members<N>* m, int count) {
    if (lane() != 0) return;
    const int slice = blockIdx.z;
    const Weight &A = p.A[slice], &B = p.B[slice];
    if (warp() == 0) {
      group = g;
      members = m;
      blocks = count;
      block = blockIdx.x % count;
      shrinks = p.x != nullptr;
      expands = p.y != nullptr;
      accumulate = p.accumulate;
      plane_sums = p.y == nullptr && p.num_planes > 1;
      part = static_cast<int>(part_length(p.d_in));
      pieces = (static_cast<int>(part_length(p.d_in)) + kDepth - 1) / kDepth;
      d_in = p.d_in;
    } else if (warp() == 1) {
      a = static_cast<const T*>(A.data) + g.slot * A.slot_stride;
      x = static_cast<const T*>(p.x);
      a_stride = A.row_stride;
      x_stride = p.x_stride;
      a_aligned = in_chunks(static_cast<const T*>(A.data) + g.slot * A.slot_stride, A.row_stride);
      x_aligned = in_chunks(static_cast<const T*>(p.x), p.x_stride);
    } else if (warp() == 2) {
      b = static_cast<const T*>(B.data) + g.slot * B.slot_stride;
      b_stride = B.row_stride;
      b_aligned = in_chunks(static_cast<const T*>(B.data) + g.slot * B.slot_stride, B.row_stride);
      columns = p.y ? B.rows : 0;
      y = static_cast<T*>(p.y) + first_column_of(p.B, slice);
      y_stride = p.y_stride;
      y_aligned = in_chunks(static_cast<T*>(p.y) + first_column_of(p.B, slice), p.y_stride);
    } else {
      const Layout layout = layout_of<T, N>(p.routing.r_max, count);
      received_at = layout.received;
      h_at = layout.h;
      log_share = __ffs(R * N / count) - 1;
      stride = h_stride(p.routing.r_max);
      own_parts = kParts / count;
      rounds = (kParts / count + S::kGroups - 1) / S::kGroups;
      planes = planes_of_slice(p, slice);
    }
  }

  __device__ float* h() const { return reinterpret_cast<float*>(dynamic_shared() + h_at); }
  __device__ float* received() const { return reinterpret_cast<float*>(dynamic_shared() + received_at); }
  __device__ int shrink_stages() const { return shrinks ? (group.rank + R - 1) / R * rounds * pieces : 0; }
  __device__ int warp() const { return threadIdx.x / kWarp; }
  __device__ int lane() const { return threadIdx.x % kWarp; }

  // A place in the sequence of stages, of shrink (pieces of rounds of rank tiles) or of expand (rank tiles of columns).
  struct ShrinkStage {
    int piece = 0, round = 0, rank = 0;
  };
  struct ExpandStage {
    int64_t column;
    int rank = 0;
  };

  __device__ char* buffer(int i) { return dynamic_shared() + i % kStages * S::kStageBytes; }

  // What lies in shared memory is read once: across the copies the compiler would read it anew each time.
  __device__ void load(int i, ShrinkStage& stage) {
    char* to = buffer(i);
    // where part j of this round begins in this stage, and how many columns are left of it
    const int64_t apart = part,
                  first = int64_t{block * own_parts + stage.round * S::kGroups} * part + stage.piece * kDepth;
    const int length = part - stage.piece * kDepth, parts = min(own_parts - stage.round * S::kGroups, S::kGroups);
    const int64_t left = d_in - first, stride_x = x_stride;
    auto count = [=](int j) { return static_cast<int>(min(int64_t{length}, left - j * apart)); };
    load_matrix<T, kDepth, S::kGroups, R, kThreads>(to, a_aligned, a + stage.rank * a_stride + first, parts, apart,
                                                    a_stride, group.rank - stage.rank, count);
    const T* from = x + first;
    const int64_t* token = members->token;
    const int tokens = group.count;
    load_rows<T, kDepth, S::kGroups * N, kThreads>(to + S::kABytes, x_aligned, parts * N, [=](int row) -> Run<T> {
      const int j = row / N, n = row % N;
      if (n >= tokens) return {from, 0};
      return {from + token[n] * stride_x + j * apart, count(j)};
    });
    if (++stage.piece < pieces) return;
    stage.piece = 0;
    if (++stage.round < rounds) return;
    stage.round = 0;
    stage.rank += R;
  }

  __device__ void load(int i, ExpandStage& stage) {
    char* to = buffer(i);
    const int left = capped(columns - stage.column), ranks = group.rank - stage.rank;
    load_matrix<T, R, 1, S::kColumns, kThreads>(to, b_aligned, b + stage.column * b_stride + stage.rank, 1, 0, b_stride,
                                                left, [=](int) { return ranks; });
    // y comes with the last ranks
    if (accumulate && ranks <= R) {
      const T* from = y + stage.column;
      const int64_t stride = y_stride;
      const int64_t* token = members->token;
      Y::load(to + S::kBBytes, group.count, y_aligned,
              [=](int n) -> Run<T> { return {from + token[n] * stride, left}; });
    }
    advance(stage);
  }

  __device__ void advance(ExpandStage& stage) const {
    if ((stage.rank += R) < group.rank) return;
    stage.rank = 0;
    stage.column += blocks * S::kColumns;
  }

  __device__ void run() {
    ExpandStage ahead = {int64_t{block} * S::kColumns};
    shrink(ahead);
    if (!shrinks) read_planes();
    if (expands) expand(ahead);
    wait_copies<0>();
  }

  // Stage i has arrived, for every thread, and nobody reads the one before it any more.
  __device__ void wait() {
    wait_copies<kStages - 2>();
    __syncthreads();
  }

  // Begins with the loads of the first stages, ends with those of the first stages of expand under way.
  __device__ void shrink(ExpandStage& expand_ahead) {
    const int j = warp() / (S::kRankWarps * S::kTokenWarps), m = warp() / S::kTokenWarps % S::kRankWarps * 16;
    const int n = warp() % S::kTokenWarps * S::kTokenTiles * 8;
    const bool parts = plane_sums || sends_parts(N, blocks);
    const int shrink_stages = this->shrink_stages();
    ShrinkStage ahead, now;
    Sums<S::kTokenTiles> sums, quarter, total;
    for (int i = 1 - kStages; i < shrink_stages; ++i) {
      if (i >= 0) wait();
      if (i + kStages - 1 < shrink_stages) {
        load(i + kStages - 1, ahead);
      } else if (expand_ahead.column < columns) {
        load(i + kStages - 1, expand_ahead);
      }
      commit_copies();
      if (i < 0) continue;
      if (i == 0 && blocks > 1 && !plane_sums) cluster_sync();  // all have begun: their shared memory can be written

      if (now.piece == 0) set_zero<S::kTokenTiles>(sums);
      const int own = now.round * S::kGroups + j;
      if (own < own_parts) {
        multiply_tiles<S::kTokenTiles, kDepth, T>(sums, buffer(i), j * R + m, buffer(i) + S::kABytes, j * N + n);
      }
      if (++now.piece < pieces) continue;
      now.piece = 0;
      if (parts) {
        if (own < own_parts) send<S::kTokenTiles>(sums, block * own_parts + own, now.rank, m, n);
      } else {
        // here a warp has all parts of its block, one a round
        add<S::kTokenTiles>(quarter, sums, own % kQuarter == 0);
        if (own % kQuarter == kQuarter - 1) {
          if (blocks > 1) {
            send<S::kTokenTiles>(quarter, (block * own_parts + own) / kQuarter, now.rank, m, n);
          } else {
            add<S::kTokenTiles>(total, quarter, own < kQuarter);
          }
        }
      }
      if (++now.round < rounds) continue;
      now.round = 0;
      if (!plane_sums) {
        if (parts || blocks > 1) {
          reduce(now.rank, parts);
        } else {
          keep<S::kTokenTiles>(total, now.rank, m, n);
        }
      }
      now.rank += R;
    }
  }

  // Calls function(rank, token, tile, element) for what this lane holds of Sums that begin at (m, n).
  template <int kTiles, typename Function>
  __device__ void each(int m, int n, Function function) {
    const int g = lane() / 4, t = lane() % 4;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int e = 0; e < 4; ++e) function(m + g + e / 2 * 8, n + tile * 8 + 2 * t + e % 2, tile, e);
    }
  }

  // Value `index` of the (16 or 4) that h is the sum of: to the block that adds them up, or to its plane.
  template <int kTiles>
  __device__ void send(const Sums<kTiles>& sums, int index, int first_rank, int m, int n) {
    each<kTiles>(m, n, [&](int rank, int token, int t, int e) {
      if (plane_sums) {
        if (token < group.count) write_h(index, first_rank + rank, token, sums[t][e]);
      } else {
        const int place = token * R + rank;
        store_shared_of(place >> log_share, received() + (index << log_share) + (place & ((1 << log_share) - 1)),
                        sums[t][e]);
      }
    });
  }

  // All sums of a block go to h.
  template <int kTiles>
  __device__ void keep(const Sums<kTiles>& sums, int first_rank, int m, int n) {
    each<kTiles>(m, n, [&](int rank, int token, int t, int e) {
      if (expands) {
        h()[token * stride + first_rank + rank] = factor_of(sums[t][e], first_rank + rank);
      } else if (token < group.count) {
        write_h(0, first_rank + rank, token, sums[t][e]);
      }
    });
  }

  // All blocks of the group have come here, and see what each has written.
  __device__ void meet() {
    if (blocks > 1) {
      cluster_sync();
    } else {
      __syncthreads();
    }
  }

  // The blocks add up what they received and send it to all.
  __device__ void reduce(int first_rank, bool parts) {
    meet();
    const int share = 1 << log_share;
    for (int e = threadIdx.x * 4; e < share; e += kThreads * 4) {
      auto value = [&](int i) { return *reinterpret_cast<const float4*>(received() + i * share + e); };
      auto four = [&](int i) { return plus(plus(plus(value(i), value(i + 1)), value(i + 2)), value(i + 3)); };
      const float4 sum = parts ? plus(plus(plus(four(0), four(4)), four(8)), four(12)) : four(0);
      const int place = block * share + e, token = place / R, rank = first_rank + place % R;
      const float values[4] = {sum.x, sum.y, sum.z, sum.w};
      if (!expands) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (token < group.count) write_h(0, rank + i, token, values[i]);
        }
      } else {
        const float4 done = {factor_of(values[0], rank), factor_of(values[1], rank + 1), factor_of(values[2], rank + 2),
                             factor_of(values[3], rank + 3)};
        float4* to = reinterpret_cast<float4*>(h() + token * stride + rank);
        for (int to_block = 0; to_block < blocks; ++to_block) store_shared_of(to_block, to, done);
      }
    }
    meet();
  }

  __device__ static float4 plus(float4 a, float4 b) { return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w}; }

  // h as expand multiplies it: zero beyond the rank, whatever x held there, and rounded where the product is of tf32.
  __device__ float factor_of(float value, int rank) const {
    if (rank >= group.rank) return 0.0f;
    return std::is_same<T, float>::value ? value : __uint_as_float(round_tf32(value));
  }

  __device__ void write_h(int plane, int rank, int token, float value) {
    if (rank < group.rank) planes.row(plane, members->pair[token])[rank] = value;
  }

  // h from global memory, where it is one plane or the sum of kParts.
  __device__ void read_planes() {
    const int ranks = (group.rank + R - 1) / R * R;
    for (int e = threadIdx.x; e < ranks * N; e += kThreads) {
      const int token = e / ranks, rank = e % ranks;
      float sum = 0.0f;
      if (token < group.count && rank < group.rank) sum = planes.sum(members->pair[token], rank);
      h()[token * stride + rank] = factor_of(sum, rank);
    }
  }

  // With several rank tiles the sums of a tile of y run through as many stages; else a warp may have several to itself.
  __device__ void expand(ExpandStage& ahead) {
    constexpr int kTiles = N / 8;
    const int first = warp() * S::kWarpColumns;
    Sums<kTiles> sums;
    ExpandStage now = {int64_t{block} * S::kColumns};
    for (int i = shrink_stages(); now.column < columns; ++i, advance(now)) {
      wait();
      if (ahead.column < columns) load(i + kStages - 1, ahead);
      commit_copies();
      char* from = buffer(i);
      const bool is_last = now.rank + R >= group.rank;
#pragma unroll
      for (int m = first; m < first + S::kWarpColumns; m += 16) {
        if (now.rank == 0) set_zero<kTiles>(sums);
        multiply_h<kTiles, R, true, T>(sums, from, m, h() + now.rank, stride);
        if (!is_last) continue;
        each<kTiles>(m, 0, [&](int column, int token, int t, int e) {
          if (token >= group.count) return;
          T& place = Y::at(from + S::kBBytes, token, column);
          const float factor = members->factor[token];
          place = from_float<T>(accumulate ? fmaf(factor, sums[t][e], to_float(place)) : factor * sums[t][e]);
        });
      }
      if (!is_last) continue;
      __syncwarp();
      const int64_t column = now.column + first;
      const int left = capped(columns - column);
      Y::template store<S::kWarpColumns>(from + S::kBBytes, first, group.count, y_aligned, [&](int token) -> RunOut<T> {
        return {y + members->token[token] * y_stride + column, left};
      });
    }
  }
};

template <int R, typename T, int N>
__device__ __forceinline__ void run(char* place, const BgmvParams& p, const Group& group, const Members<N>* members,
                                    int blocks) {
  auto& block = *reinterpret_cast<LoraBlock<T, N, R>*>(place);
  block.set(p, group, members, blocks);
  __syncthreads();
  block.run();
}

// blockIdx.x: the blocks of a group side by side, group after group; blockIdx.z: the slice.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads, N <= 16 ? 4 : 3)
    lora(const __grid_constant__ BgmvParams p, int blocks, int step) {
  __shared__ Members<N> members;
  __shared__ __align__(16) char block[sizeof(LoraBlock<T, N, 16>)];
  const Group group = find_group<N>(p.routing, blockIdx.x / blocks, step, members);
  if (group.count == 0) return;
  if (group.rank <= 16) {
    run<16, T, N>(block, p, group, &members, blocks);
  } else if (group.rank <= 32) {
    run<32, T, N>(block, p, group, &members, blocks);
  } else {
    run<64, T, N>(block, p, group, &members, blocks);
  }
}

}  // namespace lorakern::cuda
