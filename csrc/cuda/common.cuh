// What the kernels of several files share: elements and their conversion, the routing of a pair, launches and errors.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "params.h"

namespace lorakern::cuda {

constexpr int kWarp = 32;

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T>
__device__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

__device__ __forceinline__ int64_t element(const IntArray& array, int64_t offset) {
  return array.wide ? static_cast<const int64_t*>(array.data)[offset] : static_cast<const int32_t*>(array.data)[offset];
}

inline __host__ __device__ int64_t pairs_of(const Routing& r) { return r.num_tokens * r.num_choices; }

// Where in y, or in dy, a slice begins.
__device__ __forceinline__ int64_t first_column_of(const Weight* B, int slice) {
  int64_t column = 0;
  for (int before = 0; before < slice; ++before) column += B[before].rows;
  return column;
}

struct TokenChoice {
  int64_t token, choice;
};

__device__ __forceinline__ TokenChoice split(const Routing& r, int64_t pair) {
  if (r.num_choices == 1) return {pair, 0};
  // 32 bits, which divide many times faster, hold every pair: a plan numbers them so
  const uint32_t p = static_cast<uint32_t>(pair), choices = static_cast<uint32_t>(r.num_choices);
  return {p / choices, p % choices};
}

// The slot of a pair (token t, choice k; p = t * K + k), or -1 where it has none.
__device__ __forceinline__ int slot_of(const Routing& r, int64_t pair) {
  const auto [token, choice] = split(r, pair);
  const int64_t slot = element(r.indices, token * r.indices_token_stride + choice * r.indices_choice_stride);
  return slot < 0 || slot >= r.num_slots ? -1 : static_cast<int>(slot);
}

// The rank of a slot, 0 .. r_max; 0 where there is no slot.
__device__ __forceinline__ int rank_of(const Routing& r, int slot) {
  if (slot < 0) return 0;
  if (r.ranks.data == nullptr) return static_cast<int>(r.r_max);
  const int64_t rank = element(r.ranks, slot * r.ranks_stride);
  return static_cast<int>(rank < 0 ? 0 : rank > r.r_max ? r.r_max : rank);
}

__device__ __forceinline__ float gate_of(const Routing& r, int64_t pair) {
  if (r.gates == nullptr) return 1.0f;
  const auto [token, choice] = split(r, pair);
  return r.gates[token * r.gates_token_stride + choice * r.gates_choice_stride];
}

__device__ __forceinline__ float scale_of(const Routing& r, int slot) {
  return r.scale == nullptr ? 1.0f : r.scale[slot * r.scale_stride];
}

// Calls function(T{}) with the type that stands for a dtype; what it returns, or an error for another dtype.
template <typename Function>
cudaError_t with_dtype(Dtype dtype, Function function) {
  switch (dtype) {
    case Dtype::kFloat32:
      return function(float{});
    case Dtype::kFloat16:
      return function(__half{});
    case Dtype::kBFloat16:
      return function(__nv_bfloat16{});
  }
  return cudaErrorInvalidValue;
}

// Loads kernels now rather than at their first launch.
template <typename... Kernels>
cudaError_t load_kernels(Kernels... kernels) {
  cudaFuncAttributes unused;
  cudaError_t error = cudaSuccess;
  ((error = error ? error : cudaFuncGetAttributes(&unused, kernels)), ...);
  return error;
}

// What CUDA has to say against a call, or null.
inline const char* describe(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // reported now: it must not turn up again in the next call
  return cudaGetErrorString(error);
}

}  // namespace lorakern::cuda
