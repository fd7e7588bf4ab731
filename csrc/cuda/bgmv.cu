// y[t] (+)= sum_k gates[t, k] * scale[i] * B[i, :, :r] (A[i, :r] x[t]) with i = indices[t, k] and r = ranks[i].
// Two launches:
//   shrink  one block per (pair, slice, kRows ranks): h[slice, pair, rank] = A row . x
//   expand  one thread per (token, slice, column):    y[token, column] (+)= sum over k, then rank, of B row . h
//
// Every sum has one order, set by d_in and the rank alone: no atomics, nothing depends on the grid or on other tokens.
// A row that starts on 16 bytes is read by 16-byte loads, any other element by element into the same places, so that
// alignment never changes a bit of the result. Multiply-adds are spelled fmaf: the compiler has no rounding to choose.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "params.h"

namespace lorakern::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kRows = 2;   // ranks per shrink block: they share the loads of x, and few keep a lone token spread out
constexpr int kChunk = 8;  // consecutive elements one thread reads at a time: 16 bytes of fp16 and bf16

__device__ float to_float(float v) { return v; }
__device__ float to_float(__half v) { return __half2float(v); }
__device__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T>
__device__ T from_float(float v);
template <>
__device__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __half from_float<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

__device__ bool on_16_bytes(const void* row) { return reinterpret_cast<uintptr_t>(row) % 16 == 0; }

// out[i] = row[first + i] where first + i < end, else 0, which is not read. `first` is a multiple of kChunk.
template <typename T>
__device__ void load_chunk(float (&out)[kChunk], const T* row, int64_t first, int64_t end, bool aligned) {
  const T* source = row + first;
  if (aligned && end - first >= kChunk) {
    constexpr int kPerLoad = 16 / sizeof(T);
#pragma unroll
    for (int load = 0; load < kChunk / kPerLoad; ++load) {
      alignas(16) T values[kPerLoad];
      *reinterpret_cast<uint4*>(values) = __ldg(reinterpret_cast<const uint4*>(source) + load);
#pragma unroll
      for (int i = 0; i < kPerLoad; ++i) out[load * kPerLoad + i] = to_float(values[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) out[i] = i < end - first ? to_float(source[i]) : 0.0f;
  }
}

__device__ float dot_chunk(const float (&a)[kChunk], const float (&b)[kChunk]) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) sum = fmaf(a[i], b[i], sum);
  return sum;
}

__device__ int64_t element(const IntArray& array, int64_t offset) {
  return array.wide ? static_cast<const int64_t*>(array.data)[offset] : static_cast<const int32_t*>(array.data)[offset];
}

struct Adapter {
  int64_t slot;
  int64_t rank;  // 0: the pair has no adapter, and slot means nothing
};

__device__ Adapter adapter_of(const BgmvParams& p, int64_t token, int64_t choice) {
  const int64_t slot = element(p.indices, token * p.indices_token_stride + choice * p.indices_choice_stride);
  if (slot < 0 || slot >= p.num_slots) return {-1, 0};
  if (p.ranks.data == nullptr) return {slot, p.r_max};
  const int64_t rank = element(p.ranks, slot * p.ranks_stride);
  return {slot, rank < 0 ? 0 : rank > p.r_max ? p.r_max : rank};
}

template <typename T>
__device__ const T* row_of(const Weight& weight, int64_t slot, int64_t row) {
  return static_cast<const T*>(weight.data) + slot * weight.slot_stride + row * weight.row_stride;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) shrink(const __grid_constant__ BgmvParams p) {
  __shared__ float warp_sums[kWarps][kRows];
  const int slice = blockIdx.y;
  const int thread = threadIdx.x;
  const int64_t num_pairs = p.num_tokens * p.num_choices;
  // Whatever decides about loops and branches around __syncthreads is the same for the whole block.
  for (int64_t pair = blockIdx.x; pair < num_pairs; pair += gridDim.x) {
    const int64_t token = pair / p.num_choices;
    const Adapter adapter = adapter_of(p, token, pair % p.num_choices);
    const T* x = static_cast<const T*>(p.x) + token * p.x_stride;
    const bool x_aligned = on_16_bytes(x);
    for (int64_t first = int64_t{blockIdx.z} * kRows; first < adapter.rank; first += int64_t{gridDim.z} * kRows) {
      float sums[kRows] = {};
      for (int64_t column = thread * kChunk; column < p.d_in; column += kThreads * kChunk) {
        float xs[kChunk];
        load_chunk(xs, x, column, p.d_in, x_aligned);
#pragma unroll
        for (int j = 0; j < kRows; ++j) {
          if (first + j < adapter.rank) {
            const T* a = row_of<T>(p.A[slice], adapter.slot, first + j);
            float as[kChunk];
            load_chunk(as, a, column, p.d_in, on_16_bytes(a));
            sums[j] += dot_chunk(as, xs);
          }
        }
      }
#pragma unroll
      for (int j = 0; j < kRows; ++j) {
        for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) sums[j] += __shfl_xor_sync(0xffffffffu, sums[j], lanes);
        if (thread % kWarp == 0) warp_sums[thread / kWarp][j] = sums[j];
      }
      __syncthreads();
      if (thread < kRows && first + thread < adapter.rank) {
        float sum = 0.0f;
        for (int warp = 0; warp < kWarps; ++warp) sum += warp_sums[warp][thread];
        p.h[(slice * num_pairs + pair) * p.r_max + first + thread] = sum;
      }
      __syncthreads();  // before the next round overwrites warp_sums
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) expand(const __grid_constant__ BgmvParams p) {
  const int slice = blockIdx.z;
  const int64_t columns = p.B[slice].rows;
  int64_t first_column = 0;  // where in y the slice begins
  for (int before = 0; before < slice; ++before) first_column += p.B[before].rows;
  for (int64_t token = blockIdx.x; token < p.num_tokens; token += gridDim.x) {
    T* y = static_cast<T*>(p.y) + token * p.y_stride + first_column;
    for (int64_t column = int64_t{blockIdx.y} * kThreads + threadIdx.x; column < columns;
         column += int64_t{gridDim.y} * kThreads) {
      float total = 0.0f;
      bool any = false;
      for (int64_t choice = 0; choice < p.num_choices; ++choice) {
        const Adapter adapter = adapter_of(p, token, choice);
        if (adapter.rank == 0) continue;
        any = true;
        const int64_t pair = token * p.num_choices + choice;
        const float* h = p.h + (slice * p.num_tokens * p.num_choices + pair) * p.r_max;
        const T* b = row_of<T>(p.B[slice], adapter.slot, column);
        const bool h_aligned = on_16_bytes(h), b_aligned = on_16_bytes(b);
        float sum = 0.0f;
        for (int64_t rank = 0; rank < adapter.rank; rank += kChunk) {
          float hs[kChunk], bs[kChunk];
          load_chunk(hs, h, rank, adapter.rank, h_aligned);
          load_chunk(bs, b, rank, adapter.rank, b_aligned);
          sum += dot_chunk(bs, hs);
        }
        float factor = p.gates ? p.gates[token * p.gates_token_stride + choice * p.gates_choice_stride] : 1.0f;
        if (p.scale) factor *= p.scale[adapter.slot * p.scale_stride];
        total = fmaf(factor, sum, total);
      }
      if (any) y[column] = from_float<T>(p.accumulate ? to_float(y[column]) + total : total);
    }
  }
}

// Kernels loop over what does not fit a grid, so that any size is one launch.
dim3 grid(int64_t x, int64_t y, int64_t z) {
  return dim3(static_cast<unsigned>(std::min<int64_t>(x, 2147483647)),
              static_cast<unsigned>(std::min<int64_t>(y, 65535)), static_cast<unsigned>(std::min<int64_t>(z, 65535)));
}

template <typename T>
cudaError_t launch(const BgmvParams& p, cudaStream_t stream) {
  int64_t columns = 0;
  for (int slice = 0; slice < p.num_slices; ++slice) columns = std::max(columns, p.B[slice].rows);
  const int64_t pairs = p.num_tokens * p.num_choices;
  if (pairs == 0 || p.num_slots == 0 || p.r_max == 0 || columns == 0) return cudaSuccess;  // no row has an adapter
  cudaLaunchConfig_t config = {};
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  config.gridDim = grid(pairs, p.num_slices, (p.r_max + kRows - 1) / kRows);
  if (cudaError_t error = cudaLaunchKernelEx(&config, shrink<T>, p)) return error;
  config.gridDim = grid(p.num_tokens, (columns + kThreads - 1) / kThreads, p.num_slices);
  return cudaLaunchKernelEx(&config, expand<T>, p);
}

template <typename T>
cudaError_t load() {
  cudaFuncAttributes unused;
  if (cudaError_t error = cudaFuncGetAttributes(&unused, shrink<T>)) return error;
  return cudaFuncGetAttributes(&unused, expand<T>);
}

const char* describe(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // reported now: it must not turn up again in the next call
  return cudaGetErrorString(error);
}

}  // namespace

const char* bgmv(const BgmvParams& params, int device, void* stream) {
  if (cudaError_t error = cudaSetDevice(device)) return describe(error);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  switch (params.dtype) {
    case Dtype::kFloat32:
      return describe(launch<float>(params, cuda_stream));
    case Dtype::kFloat16:
      return describe(launch<__half>(params, cuda_stream));
    case Dtype::kBFloat16:
      return describe(launch<__nv_bfloat16>(params, cuda_stream));
  }
  return describe(cudaErrorInvalidValue);
}

const char* preload(int device) {
  cudaError_t error = cudaSetDevice(device);
  if (!error) error = load<float>();
  if (!error) error = load<__half>();
  if (!error) error = load<__nv_bfloat16>();
  return describe(error);
}

const char* problem() {
  int devices = 0;
  return describe(cudaGetDeviceCount(&devices));
}

}  // namespace lorakern::cuda
