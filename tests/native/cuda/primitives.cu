// Each special instruction by itself, for comparison with what tests/test_cuda_emulated.py works out in another way.
#include <ptx.cuh>

#include "launch.h"

using namespace lorakern::cuda;

namespace {

constexpr unsigned kAll = 0xffffffff;

// in: 32 rows of 8; out (32 lanes, 4)
__global__ void load(const uint16_t* in, uint32_t* out) {
  const int lane = threadIdx.x;
  auto* rows = reinterpret_cast<uint16_t*>(dynamic_shared());
  copy_async(rows + 8 * lane, in + 8 * lane, 16);
  commit_copies();
  wait_copies<0>();
  __syncwarp();
  uint32_t fragment[4];
  load_matrices(fragment, rows + 8 * lane);
  for (int i = 0; i < 4; ++i) out[4 * lane + i] = fragment[i];
}

template <typename T>
__device__ uint32_t pair(const T* matrix, int columns, int row, int column) {
  uint32_t bits;
  memcpy(&bits, matrix + row * columns + column, sizeof bits);
  return bits;
}

// c (16, 8) += a (16, 16) b^T, b (8, 16)
template <typename T>
__global__ void product(const T* a, const T* b, float* c) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  const uint32_t left[4] = {pair(a, 16, g, 2 * t), pair(a, 16, g + 8, 2 * t), pair(a, 16, g, 2 * t + 8),
                            pair(a, 16, g + 8, 2 * t + 8)};
  float sums[4] = {c[g * 8 + 2 * t], c[g * 8 + 2 * t + 1], c[(g + 8) * 8 + 2 * t], c[(g + 8) * 8 + 2 * t + 1]};
  multiply<T>(sums, left, pair(b, 16, g, 2 * t), pair(b, 16, g, 2 * t + 8));
  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sums[i];
}

// c (16, 8) += a (16, 8) b (8, 8)
__global__ void product_tf32(const float* a, const float* b, float* c) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  const uint32_t left[4] = {round_tf32(a[g * 8 + t]), round_tf32(a[(g + 8) * 8 + t]), round_tf32(a[g * 8 + t + 4]),
                            round_tf32(a[(g + 8) * 8 + t + 4])};
  float sums[4] = {c[g * 8 + 2 * t], c[g * 8 + 2 * t + 1], c[(g + 8) * 8 + 2 * t], c[(g + 8) * 8 + 2 * t + 1]};
  multiply_tf32(sums, left, round_tf32(b[t * 8 + g]), round_tf32(b[(t + 4) * 8 + g]));
  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sums[i];
}

// out (12, 32): a row for each function
__global__ void warp_functions(int* out) {
  const int lane = threadIdx.x, value = 100 + lane;
  const int results[] = {
      __shfl_sync(kAll, value, 5),
      __shfl_sync(kAll, value, lane + 1, 8),
      __shfl_xor_sync(kAll, value, 16),
      __shfl_xor_sync(kAll, value, 3, 4),
      __shfl_up_sync(kAll, value, 3),
      __shfl_up_sync(kAll, value, 1, 8),
      __shfl_down_sync(kAll, value, 3),
      __shfl_down_sync(kAll, value, 1, 8),
      static_cast<int>(__ballot_sync(kAll, lane % 3 == 0)),
      __any_sync(kAll, lane == 31),
      __all_sync(kAll, lane < 31),
      static_cast<int>(__ballot_sync(lane < 8 ? 0xffu : 0xffffff00u, lane % 2)),
  };
  for (int i = 0; i < 12; ++i) out[32 * i + lane] = results[i];
}

// out (3, threads)
__global__ void block_functions(int* out) {
  const int thread = threadIdx.x + blockDim.x * threadIdx.y, threads = blockDim.x * blockDim.y;
  out[thread] = __syncthreads_count(thread % 3 == 0);
  out[threads + thread] = __syncthreads_or(thread == 7);
  out[2 * threads + thread] = __syncthreads_and(thread != 7);
}

// Every block sends its rank + 1 to all, in static and dynamic shared memory. out (blocks, 2, cluster), floats
__global__ void exchange(float* out) {
  __shared__ float received[8];
  __shared__ float4 vectors[8];
  auto* dynamic = reinterpret_cast<float4*>(dynamic_shared());
  const unsigned mine = emulator::cluster_rank(), size = emulator::cluster_size();
  const float value = blockIdx.x + 1.0f;
  cluster_sync();
  if (threadIdx.x < size) {
    store_shared_of(threadIdx.x, received + mine, value);
    store_shared_of(threadIdx.x, dynamic + mine, make_float4(0, value, 0, 0));
    store_shared_of(threadIdx.x, vectors + mine, make_float4(0, 0, value, 0));
  }
  cluster_sync();
  if (threadIdx.x < size) {
    out[blockIdx.x * 2 * size + threadIdx.x] = received[threadIdx.x];
    out[blockIdx.x * 2 * size + size + threadIdx.x] = dynamic[threadIdx.x].y + vectors[threadIdx.x].z;
  }
}

__global__ void convert(const float* in, uint16_t* halves, uint16_t* bfloats, uint32_t* tf32, int count) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) {
    halves[i] = __half_as_ushort(__float2half_rn(in[i]));
    bfloats[i] = __bfloat16_as_ushort(__float2bfloat16_rn(in[i]));
    tf32[i] = round_tf32(in[i]);
  }
}

__global__ void widen(float* halves, float* bfloats) {
  const auto bits = static_cast<unsigned short>(blockIdx.x * blockDim.x + threadIdx.x);
  halves[bits] = __half2float(__ushort_as_half(bits));
  bfloats[bits] = __bfloat162float(__ushort_as_bfloat16(bits));
}

__global__ void barriers(int rounds) {
  for (int i = 0; i < rounds; ++i) __syncthreads();
}

}  // namespace

LORAKERN_EXPORT const char* load_matrices(const uint16_t* in, uint32_t* out) {
  return launch(load, 1, 32, 512, 0, in, out);
}

LORAKERN_EXPORT const char* multiply_half(const __half* a, const __half* b, float* c) {
  return launch(product<__half>, 1, 32, 0, 0, a, b, c);
}

LORAKERN_EXPORT const char* multiply_bfloat16(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c) {
  return launch(product<__nv_bfloat16>, 1, 32, 0, 0, a, b, c);
}

LORAKERN_EXPORT const char* multiply_tf32(const float* a, const float* b, float* c) {
  return launch(product_tf32, 1, 32, 0, 0, a, b, c);
}

LORAKERN_EXPORT const char* shuffles_and_votes(int* out) { return launch(warp_functions, 1, 32, 0, 0, out); }

LORAKERN_EXPORT const char* block_votes(int* out) { return launch(block_functions, 1, dim3(24, 3), 0, 0, out); }

LORAKERN_EXPORT const char* exchange_in_clusters(float* out, int blocks, int cluster) {
  return launch(exchange, blocks, 64, 128, cluster, out);
}

LORAKERN_EXPORT const char* narrow_floats(const float* in, uint16_t* halves, uint16_t* bfloats, uint32_t* tf32,
                                          int count) {
  return launch(convert, 64, 256, 0, 0, in, halves, bfloats, tf32, count);
}

LORAKERN_EXPORT const char* widen_floats(float* halves, float* bfloats) {
  return launch(widen, 256, 256, 0, 0, halves, bfloats);
}

LORAKERN_EXPORT const char* many_barriers(int blocks, int threads, int rounds) {
  return launch(barriers, blocks, threads, 0, 0, rounds);
}
