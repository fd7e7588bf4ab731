// Tiles in shared memory: how they are laid out, filled and multiplied. Shared by every kernel with a pipeline.
//
// A tile is rows of kColumns elements. A row is cut into chunks of 16 bytes, and chunk c of row r lies at place
// c ^ f(r), so that neither writing a row nor reading one chunk of eight rows meets a bank twice.
#pragma once
#include <ptx.cuh>

#include "common.cuh"

namespace lorakern::cuda {

template <typename T>
constexpr int kPerChunk = 16 / sizeof(T);

template <typename T, int kColumns>
struct Tile {
  static constexpr int kChunks = kColumns / kPerChunk<T>;
  static constexpr int kRowBytes = kColumns * sizeof(T);

  __device__ static __forceinline__ int offset(int row, int chunk) {
    const int swizzle = kChunks >= 8 ? row % 8 : row / (8 / kChunks) % kChunks;
    return row * kRowBytes + (chunk ^ swizzle) * 16;
  }
  __device__ static __forceinline__ char* chunk(char* tile, int row, int chunk) { return tile + offset(row, chunk); }
};

// Elements that lie side by side in global memory: `count` of them, none where it is 0 or less.
template <typename T>
struct Run {
  const T* data;
  int count;
};

// A count that may pass 31 bits, of which only the chunk at hand matters.
__device__ __forceinline__ int capped(int64_t count) { return static_cast<int>(count < 1 << 30 ? count : 1 << 30); }

inline __host__ __device__ bool on_16_bytes(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

// Can rows that begin here, `stride` elements apart, be read in chunks?
template <typename T>
inline __host__ __device__ bool in_chunks(const T* row, int64_t stride) {
  return on_16_bytes(row) && stride % kPerChunk<T> == 0;
}

// Begins to fill one chunk of shared memory from a run, zeros after its end. `aligned` runs arrive with the copies of
// this thread, others are there at the next barrier; what arrives does not depend on it.
template <typename T>
__device__ __forceinline__ void load_chunk(char* shared, Run<T> run, bool aligned) {
  const int count = min(max(run.count, 0), kPerChunk<T>);
  if (aligned) {
    copy_async(shared, run.data, count * static_cast<int>(sizeof(T)));
  } else {
    alignas(16) T values[kPerChunk<T>];
#pragma unroll
    for (int i = 0; i < kPerChunk<T>; ++i) values[i] = i < count ? run.data[i] : from_float<T>(0.0f);
    *reinterpret_cast<uint4*>(shared) = *reinterpret_cast<const uint4*>(values);
  }
}

// Fills the first `rows` of kRows rows, of which row r comes from source(r), a Run.
template <typename T, int kColumns, int kRows, int kThreads, typename Source>
__device__ __forceinline__ void load_rows(char* tile, bool aligned, int rows, Source source) {
  using Layout = Tile<T, kColumns>;
#pragma unroll
  for (int first = 0; first < kRows * Layout::kChunks; first += kThreads) {
    const int i = first + threadIdx.x, row = i / Layout::kChunks, chunk = i % Layout::kChunks;
    if (row >= rows) break;
    Run<T> run = source(row);
    run.count -= chunk * kPerChunk<T>;
    run.data += chunk * kPerChunk<T>;
    load_chunk(Layout::chunk(tile, row, chunk), run, aligned);
  }
}

// Fills the first `outer` of kOuter times kRows rows: row r of the j-th is `first` + j * outer_stride + r * row_stride
// and has count(j) elements, none where r >= rows.
template <typename T, int kColumns, int kOuter, int kRows, int kThreads, typename Count>
__device__ __forceinline__ void load_matrix(char* tile, bool aligned, const T* first, int outer, int64_t outer_stride,
                                            int64_t row_stride, int rows, Count count) {
  using Layout = Tile<T, kColumns>;
  constexpr int kStep = kThreads / Layout::kChunks;  // rows at a time
  static_assert(kRows % kStep == 0, "a thread keeps to one row in kStep");
  const int own_row = threadIdx.x / Layout::kChunks, chunk = threadIdx.x % Layout::kChunks;
  first += own_row * row_stride + chunk * kPerChunk<T>;
#pragma unroll
  for (int i = 0; i < kOuter * kRows; i += kStep) {
    const int j = i / kRows, r = i % kRows;
    if (j >= outer) break;
    const Run<T> run = {first + j * outer_stride + r * row_stride,
                        own_row + r < rows ? count(j) - chunk * kPerChunk<T> : 0};
    load_chunk(Layout::chunk(tile, i + own_row, chunk), run, aligned);
  }
}

// The place, in bytes, of one stage in a ring of kStages; `at` goes on to the next.
template <int kStages, int kBytes>
__device__ __forceinline__ int next_stage(int& at) {
  const int now = at;
  at = now == (kStages - 1) * kBytes ? 0 : now + kBytes;
  return now;
}

template <typename T>
struct RunOut {
  T* data;
  int count;
};

// A tile of y: rows of tokens. The padding keeps neighbouring tokens off the same banks.
template <typename T, int kColumns>
struct YTile {
  static constexpr int kRowBytes = kColumns * sizeof(T) + 16;

  __device__ static __forceinline__ T& at(char* tile, int token, int column) {
    return *reinterpret_cast<T*>(tile + token * kRowBytes + column * sizeof(T));
  }

  // Begins to fill `tokens` rows from source(token), a Run, by all threads of the block.
  template <typename Source>
  __device__ static __forceinline__ void load(char* tile, int tokens, bool aligned, Source source) {
    constexpr int kChunks = kColumns / kPerChunk<T>;
    for (int i = threadIdx.x; i < tokens * kChunks; i += blockDim.x) {
      const int token = i / kChunks, chunk = i % kChunks;
      Run<T> run = source(token);
      run.count -= chunk * kPerChunk<T>;
      run.data += chunk * kPerChunk<T>;
      load_chunk(tile + token * kRowBytes + chunk * 16, run, aligned);
    }
  }

  // Writes the kStored columns from `first` on to target(token), a RunOut, by the threads of a warp.
  template <int kStored, typename Target>
  __device__ static __forceinline__ void store(char* tile, int first, int tokens, bool aligned, Target target) {
    constexpr int kChunks = kStored / kPerChunk<T>;
    for (int i = threadIdx.x % kWarp; i < tokens * kChunks; i += kWarp) {
      const int token = i / kChunks, chunk = i % kChunks;
      RunOut<T> run = target(token);
      run.count -= chunk * kPerChunk<T>;
      run.data += chunk * kPerChunk<T>;
      const T* from = &at(tile, token, first + chunk * kPerChunk<T>);
      if (aligned && run.count >= kPerChunk<T>) {
        *reinterpret_cast<uint4*>(run.data) = *reinterpret_cast<const uint4*>(from);
      } else {
#pragma unroll
        for (int j = 0; j < kPerChunk<T>; ++j) {
          if (j < run.count) run.data[j] = from[j];
        }
      }
    }
  }
};

// The sums of a warp: kTiles products of 16 rows and 8 tokens side by side. Lane 4 g + t holds, of each, the rows g
// (elements 0, 1) and g + 8 (2, 3) of the tokens 2 t and 2 t + 1.
template <int kTiles>
using Sums = float[kTiles][4];

template <int kTiles>
__device__ __forceinline__ void set_zero(Sums<kTiles>& sums) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[n][i] = 0.0f;
  }
}

// a += b, or a = b.
template <int kTiles>
__device__ __forceinline__ void add(Sums<kTiles>& a, const Sums<kTiles>& b, bool assign) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[n][i] = assign ? b[n][i] : a[n][i] + b[n][i];
  }
}

__device__ __forceinline__ float add_product(float sum, float4 a, float4 b) {
  return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
}

// sums += the rows w .. w + 15 of float32 `weights` times tokens, of which value(token, chunk) gives four elements.
template <int kTiles, typename Layout, typename Value>
__device__ __forceinline__ void multiply_floats(Sums<kTiles>& sums, char* weights, int w, int chunks, Value value) {
  const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
#pragma unroll(kTiles > 1 ? 1 : 4)
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const float4 upper = *reinterpret_cast<const float4*>(Layout::chunk(weights, w + g, chunk));
    const float4 lower = *reinterpret_cast<const float4*>(Layout::chunk(weights, w + g + 8, chunk));
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float4 v = value(8 * n + 2 * t + i, chunk);
        sums[n][i] = add_product(sums[n][i], upper, v);
        sums[n][2 + i] = add_product(sums[n][2 + i], lower, v);
      }
    }
  }
}

// sums += the rows w .. w + 15 of `weights` times the rows x .. of `tokens`, all kColumns columns of both.
template <int kTiles, int kColumns, typename T>
__device__ __forceinline__ void multiply_tiles(Sums<kTiles>& sums, char* weights, int w, char* tokens, int x) {
  using Layout = Tile<T, kColumns>;
  const int lane = threadIdx.x % kWarp;
  if constexpr (std::is_same<T, float>::value) {
    multiply_floats<kTiles, Layout>(sums, weights, w, Layout::kChunks, [&](int token, int chunk) {
      return *reinterpret_cast<const float4*>(Layout::chunk(tokens, x + token, chunk));
    });
  } else {
#pragma unroll(kTiles > 4 ? 1 : kColumns / 16)
    for (int step = 0; step < kColumns / 16; ++step) {
      uint32_t a[4];
      load_matrices(a, Layout::chunk(weights, w + lane % 16, 2 * step + lane / 16));
      if constexpr (kTiles == 1) {
        // the fragments of two steps in one load
        uint32_t b[4];
        load_matrices(b, Layout::chunk(tokens, x + lane % 8, 2 * step + lane / 8));
        multiply<T>(sums[0], a, b[0], b[1]);
        ++step;
        load_matrices(a, Layout::chunk(weights, w + lane % 16, 2 * step + lane / 16));
        multiply<T>(sums[0], a, b[2], b[3]);
      } else {
#pragma unroll
        for (int n = 0; n < kTiles; n += 2) {
          uint32_t b[4];
          load_matrices(b, Layout::chunk(tokens, x + 8 * n + lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2));
          multiply<T>(sums[n], a, b[0], b[1]);
          multiply<T>(sums[n + 1], a, b[2], b[3]);
        }
      }
    }
  }
}

template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t pair);
template <>
__device__ __forceinline__ float2 unpack<__nv_bfloat16>(uint32_t pair) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}
template <>
__device__ __forceinline__ float2 unpack<__half>(uint32_t pair) {
  return {__half2float(__ushort_as_half(static_cast<unsigned short>(pair))),
          __half2float(__ushort_as_half(static_cast<unsigned short>(pair >> 16)))};
}

template <typename T>
__device__ __forceinline__ uint32_t pack(float first, float second) {
  struct alignas(4) Pair {
    T values[2];
  } pair = {{from_float<T>(first), from_float<T>(second)}};
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// sums += the rows w .. w + 15 of `weights` times the rows of h (float32, `stride` apart), the first kColumns ranks of
// both or the first 16 * steps. For 16-bit elements the product is one of tf32: weights are exact in it, and h, kept to
// 10 bits of mantissa, has the range of float32. h is rounded here unless it is already.
template <int kTiles, int kColumns, bool kRounded, typename T>
__device__ __forceinline__ void multiply_h(Sums<kTiles>& sums, char* weights, int w, const float* h, int stride,
                                           int steps = kColumns / 16) {
  using Layout = Tile<T, kColumns>;
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  if constexpr (std::is_same<T, float>::value) {
    multiply_floats<kTiles, Layout>(sums, weights, w, min(Layout::kChunks, 4 * steps), [&](int token, int chunk) {
      return *reinterpret_cast<const float4*>(h + token * stride + 4 * chunk);
    });
  } else {
#pragma unroll(kTiles > 2 ? 1 : kColumns / 16)
    for (int step = 0; step < kColumns / 16; ++step) {
      if (step >= steps) break;
      uint32_t pairs[4];
      load_matrices(pairs, Layout::chunk(weights, w + lane % 16, 2 * step + lane / 16));
      // A product sums over 8 ranks in any order that both factors share: t stands for rank 2 t, t + 4 for 2 t + 1.
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 upper = unpack<T>(pairs[2 * half]), lower = unpack<T>(pairs[2 * half + 1]);
        const uint32_t a[4] = {__float_as_uint(upper.x), __float_as_uint(lower.x), __float_as_uint(upper.y),
                               __float_as_uint(lower.y)};
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          const float2 v = *reinterpret_cast<const float2*>(h + (8 * n + g) * stride + 16 * step + 8 * half + 2 * t);
          multiply_tf32(sums[n], a, kRounded ? __float_as_uint(v.x) : round_tf32(v.x),
                        kRounded ? __float_as_uint(v.y) : round_tf32(v.y));
        }
      }
    }
  }
}

}  // namespace lorakern::cuda
