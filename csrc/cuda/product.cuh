// Products of two tiles by one block: c (rows x columns) += a (rows x depth) b (depth x columns).
//
// A tile comes from global memory in registers (Transfer), so that it is under way while the previous one is
// multiplied, and lies in shared memory as float32. float32 is multiplied by fmaf. What came from 16 bits is exact in
// tf32 and is multiplied by tensor cores. Each tile's product is summed on its own before it is added: long sums stay
// accurate, and an element's bits depend on its own row, column and depth alone.
#pragma once
#include <ptx.cuh>

#include "common.cuh"

namespace lorakern::cuda {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;
constexpr int kChunk = 8;  // consecutive elements that one thread loads: 16 bytes of fp16 and bf16

// The elements of a row from `first` on; nothing from `end` on, or where there is no row.
template <typename T>
struct Span {
  const T* row;
  int64_t first, end;
};

template <typename T>
struct Chunk {
  alignas(16) T values[kChunk];

  // The beginning of a span, zeros after its end.
  __device__ __forceinline__ void load(const Span<T>& span) {
    const int64_t count = span.row == nullptr ? 0 : span.end - span.first;
    const T* source = count > 0 ? span.row + span.first : nullptr;
    if (count >= kChunk && reinterpret_cast<uintptr_t>(source) % 16 == 0) {
      constexpr int kPerLoad = 16 / sizeof(T);
#pragma unroll
      for (int load = 0; load < kChunk / kPerLoad; ++load)
        *reinterpret_cast<uint4*>(values + load * kPerLoad) = reinterpret_cast<const uint4*>(source)[load];
    } else {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) values[i] = i < count ? source[i] : from_float<T>(0.0f);
    }
  }

  __device__ __forceinline__ void store(float* shared) const {
#pragma unroll
    for (int i = 0; i < kChunk; i += 4) {
      *reinterpret_cast<float4*>(shared + i) =
          make_float4(to_float(values[i]), to_float(values[i + 1]), to_float(values[i + 2]), to_float(values[i + 3]));
    }
  }
};

// A tile of kRows x kColumns elements, spread over the threads of the block.
template <typename T, int kRows, int kColumns>
struct Transfer {
  static constexpr int kChunks = kRows * kColumns / kChunk;
  static constexpr int kLoads = (kChunks + kThreads - 1) / kThreads;
  Chunk<T> chunks[kLoads];

  // source(row, column): the Span that begins there.
  template <typename Source>
  __device__ __forceinline__ void load(Source source) {
    each([&](Chunk<T>& chunk, int row, int column) { chunk.load(source(row, column)); });
  }

  template <int kStride>
  __device__ __forceinline__ void store(float* shared) {
    each([&](Chunk<T>& chunk, int row, int column) { chunk.store(shared + row * kStride + column); });
  }

 private:
  template <typename Visit>
  __device__ __forceinline__ void each(Visit visit) {
#pragma unroll
    for (int load = 0; load < kLoads; ++load) {
      const int i = load * kThreads + static_cast<int>(threadIdx.x);
      if (kChunks % kThreads == 0 || i < kChunks)
        visit(chunks[load], i / (kColumns / kChunk), i % (kColumns / kChunk) * kChunk);
    }
  }
};

// Warps stand kRows / 16 by the rest. A lane holds the elements that a tensor core gives it: of rows row(0) and row(1),
// columns column(0) .. column(kColumnsPerLane - 1), in pairs side by side.
// kLeftByDepth: `left` lies in shared memory as (depth x rows), else as (rows x depth).
template <typename T, int kRows, int kColumns, int kDepth, bool kLeftByDepth>
struct Product {
  static constexpr int kWarpRows = kRows / 16, kWarpColumns = kWarps / kWarpRows;
  static constexpr int kBlocks = kColumns / kWarpColumns / 8;
  static constexpr int kColumnsPerLane = 2 * kBlocks;
  static_assert(kWarpRows * 16 == kRows && kBlocks * kWarpColumns * 8 == kColumns, "each warp has 16 x 8 blocks");
  // Padded so that the 32 addresses of a fragment lie in 32 banks.
  static constexpr int kLeftStride = kLeftByDepth ? kRows + 8 : kDepth + 4;
  static constexpr int kRightStride = kColumns + 8;
  struct Shared {
    alignas(16) float left[(kLeftByDepth ? kDepth : kRows) * kLeftStride];
    alignas(16) float right[kDepth * kRightStride];
  };
  using Left = std::conditional_t<kLeftByDepth, Transfer<T, kDepth, kRows>, Transfer<T, kRows, kDepth>>;

  float sums[kBlocks][4] = {};

  static __device__ __forceinline__ int row(int i) { return warp() / kWarpColumns * 16 + i * 8 + lane() / 4; }
  static __device__ __forceinline__ int column(int j) {
    return (warp() % kWarpColumns * kBlocks + j / 2) * 8 + lane() % 4 * 2 + j % 2;
  }
  __device__ __forceinline__ float& at(int i, int j) { return sums[j / 2][i * 2 + j % 2]; }

  // Adds the product of the tiles over their first `depth`, to the rows that are kept. Zeros lie up to a multiple of 8.
  __device__ __forceinline__ void add(const Shared& tiles, int depth, bool keep_first = true, bool keep_second = true) {
    float parts[kBlocks][4] = {};
#pragma unroll 2
    for (int d = 0; d < depth; d += 8) multiply(parts, tiles, d);
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
      for (int c = 0; c < 4; ++c) sums[b][c] += (c < 2 ? keep_first : keep_second) ? parts[b][c] : 0.0f;
    }
  }

 private:
  static __device__ __forceinline__ int warp() { return threadIdx.x / kWarp; }
  static __device__ __forceinline__ int lane() { return threadIdx.x % kWarp; }

  static __device__ __forceinline__ float left(const Shared& tiles, int i, int d) {
    return tiles.left[kLeftByDepth ? d * kLeftStride + row(i) : row(i) * kLeftStride + d];
  }

  static __device__ __forceinline__ void multiply(float (&parts)[kBlocks][4], const Shared& tiles, int d) {
    if constexpr (std::is_same_v<T, float>) {
#pragma unroll
      for (int k = d; k < d + 8; ++k) {
        const float a0 = left(tiles, 0, k), a1 = left(tiles, 1, k);
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
          const float2 right = *reinterpret_cast<const float2*>(tiles.right + k * kRightStride + column(2 * b));
          parts[b][0] = fmaf(a0, right.x, parts[b][0]);
          parts[b][1] = fmaf(a0, right.y, parts[b][1]);
          parts[b][2] = fmaf(a1, right.x, parts[b][2]);
          parts[b][3] = fmaf(a1, right.y, parts[b][3]);
        }
      }
    } else {
      const int k = d + lane() % 4;
      const uint32_t a[4] = {__float_as_uint(left(tiles, 0, k)), __float_as_uint(left(tiles, 1, k)),
                             __float_as_uint(left(tiles, 0, k + 4)), __float_as_uint(left(tiles, 1, k + 4))};
      const float* right = tiles.right + k * kRightStride + warp() % kWarpColumns * kBlocks * 8 + lane() / 4;
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        multiply_tf32(parts[b], a, __float_as_uint(right[b * 8]), __float_as_uint(right[4 * kRightStride + b * 8]));
      }
    }
  }
};

// A float32 factor as a tile of T's products may hold it.
template <typename T>
__device__ __forceinline__ float as_factor(float value) {
  if constexpr (std::is_same_v<T, float>) {
    return value;
  } else {
    return __uint_as_float(round_tf32(value));
  }
}

// Two neighbours of a row, of which `live` (1 or more) are there; in one store where they lie on their joint size.
template <typename T>
__device__ __forceinline__ void store_pair(T* to, float first, float second, int64_t live) {
  struct alignas(2 * sizeof(T)) Pair {
    T values[2];
  };
  if (live > 1 && reinterpret_cast<uintptr_t>(to) % sizeof(Pair) == 0) {
    *reinterpret_cast<Pair*>(to) = {from_float<T>(first), from_float<T>(second)};
  } else {
    to[0] = from_float<T>(first);
    if (live > 1) to[1] = from_float<T>(second);
  }
}

}  // namespace lorakern::cuda
