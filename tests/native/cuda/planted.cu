// Kernels with a mistake each, which the emulator has to show: a wrong result under some seed, or a failed launch.
// Every one writes out[i] = i for its threads where `wrong` is false.
#include <ptx.cuh>

#include <cstring>

#include "launch.h"

using namespace lorakern::cuda;

namespace {

constexpr int kThreads = 128;
constexpr unsigned kAll = 0xffffffff;

// ---- Wrong results

__global__ void missing_barrier(float* out, const float*, bool wrong) {
  __shared__ float values[kThreads];
  values[kThreads - 1 - threadIdx.x] = kThreads - 1 - threadIdx.x;
  if (!wrong) __syncthreads();
  out[threadIdx.x] = values[threadIdx.x];
}

// The second round overwrites what others may still read in the first.
__global__ void missing_second_barrier(float* out, const float*, bool wrong) {
  __shared__ float value;
  for (int round = 0; round < 4; ++round) {
    if (threadIdx.x == static_cast<unsigned>(kThreads / 4 * round)) value = round;
    __syncthreads();
    if (value != round) out[threadIdx.x] = -1.0f;
    if (!wrong) __syncthreads();
  }
  if (out[threadIdx.x] != -1.0f) out[threadIdx.x] = threadIdx.x;
}

__device__ void copy_row(const float* numbers) {
  if (threadIdx.x >= kThreads / 4) return;
  copy_async(dynamic_shared() + 16 * threadIdx.x, numbers + 4 * threadIdx.x, 16);
}

__device__ float copied() { return reinterpret_cast<const float*>(dynamic_shared())[threadIdx.x]; }

__global__ void missing_wait(float* out, const float* numbers, bool wrong) {
  copy_row(numbers);
  commit_copies();
  if (!wrong) wait_copies<0>();
  __syncthreads();
  out[threadIdx.x] = copied();
}

__global__ void wait_for_too_few(float* out, const float* numbers, bool wrong) {
  copy_row(numbers);
  commit_copies();
  commit_copies();
  if (wrong) {
    wait_copies<2>();
  } else {
    wait_copies<1>();
  }
  __syncthreads();
  out[threadIdx.x] = copied();
}

__global__ void wait_without_barrier(float* out, const float* numbers, bool wrong) {
  copy_row(numbers);
  commit_copies();
  wait_copies<0>();
  if (!wrong) __syncthreads();
  out[threadIdx.x] = copied();
}

// Copies into what other threads still read.
__global__ void copy_too_soon(float* out, const float* numbers, bool wrong) {
  auto* values = reinterpret_cast<float*>(dynamic_shared());
  values[threadIdx.x] = threadIdx.x;
  __syncthreads();
  if (wrong) copy_row(numbers + 4);
  out[threadIdx.x] = copied();
  if (!wrong) __syncthreads();
  if (!wrong) copy_row(numbers);
  commit_copies();
  wait_copies<0>();
}

__global__ void shuffle_from_outside(float* out, const float*, bool wrong) {
  const float i = threadIdx.x;
  const unsigned low = 0x0000ffff;
  out[threadIdx.x] = i;
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = i + 0 * __shfl_sync(low, i, wrong ? 20 : 3);
}

// ---- Failed launches

__global__ void divergent_collectives(float* out, const float*, bool wrong) {
  int lane = threadIdx.x % 32;
  if (wrong && lane < 16) {
    __syncwarp();
  } else {
    lane = __shfl_sync(kAll, lane, lane);
  }
  out[threadIdx.x] = threadIdx.x / 32 * 32 + lane;
}

__global__ void divergent_product(float* out, const float*, bool wrong) {
  float c[4] = {};
  const uint32_t a[4] = {};
  if (wrong && threadIdx.x % 2 == 0) {
    multiply<__half>(c, a, 0, 0);
  } else {
    multiply<__half>(c, a, 0, 0);
  }
  out[threadIdx.x] = threadIdx.x + c[0];
}

__global__ void exited_lane(float* out, const float*, bool wrong) {
  out[threadIdx.x] = threadIdx.x;
  if (wrong && threadIdx.x == 5) return;
  out[threadIdx.x] += __any_sync(kAll, false);
}

__global__ void exited_thread(float* out, const float*, bool wrong) {
  out[threadIdx.x] = threadIdx.x;
  if (wrong && threadIdx.x == 77) return;
  __syncthreads();
}

__global__ void barrier_in_a_branch(float* out, const float*, bool wrong) {
  out[threadIdx.x] = threadIdx.x;
  if (wrong && threadIdx.x < 32) {
    __syncwarp();
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void not_in_the_mask(float* out, const float*, bool wrong) {
  out[threadIdx.x] = threadIdx.x + __any_sync(wrong ? 0xfffffffe : kAll, false);
}

__global__ void misaligned_copy(float* out, const float* numbers, bool wrong) {
  copy_async(dynamic_shared() + 16 * threadIdx.x, numbers + (wrong ? 1 : 0), 16);
  out[threadIdx.x] = threadIdx.x;
}

__global__ void copy_of_too_much(float* out, const float* numbers, bool wrong) {
  copy_async(dynamic_shared() + 16 * threadIdx.x, numbers, wrong ? 17 : 3);
  out[threadIdx.x] = threadIdx.x;
}

__global__ void copy_beyond_shared(float* out, const float* numbers, bool wrong) {
  copy_async(dynamic_shared() + 16 * threadIdx.x + (wrong ? 16 : 0), numbers, 16);
  out[threadIdx.x] = threadIdx.x;
}

__global__ void misaligned_matrix_row(float* out, const float*, bool wrong) {
  uint32_t fragment[4];
  load_matrices(fragment, dynamic_shared() + 8 * (wrong ? 1 : 2));
  out[threadIdx.x] = threadIdx.x;
}

__global__ void misaligned_vector(float* out, const float* numbers, bool wrong) {
  out[threadIdx.x] = threadIdx.x + 0 * __ldg(reinterpret_cast<const float4*>(numbers + (wrong ? 2 : 4))).x;
}

__global__ void index_beyond_array(float* out, const float*, bool wrong) {
  __shared__ float values[kThreads];
  values[threadIdx.x + (wrong ? 1 : 0)] = threadIdx.x;
  out[threadIdx.x] = values[threadIdx.x];
}

__global__ void beyond_dynamic_shared(float* out, const float*, bool wrong) {
  auto* values = reinterpret_cast<float4*>(dynamic_shared());
  values[threadIdx.x + (wrong ? 1 : 0)].x = 0;
  out[threadIdx.x] = threadIdx.x;
}

__global__ void null_pointer(float* out, const float*, bool wrong) {
  out[threadIdx.x] = threadIdx.x;
  if (wrong) *reinterpret_cast<volatile float*>(out - out) = 0;
}

// ---- Clusters of two blocks

__global__ void store_before_start(float* out, const float*, bool wrong) {
  __shared__ float value;
  if (!wrong) cluster_sync();
  store_shared_of(1 - emulator::cluster_rank(), &value, 0.0f);
  cluster_sync();
  out[threadIdx.x] = threadIdx.x + value;
}

__global__ void store_after_exit(float* out, const float*, bool wrong) {
  __shared__ float value;
  out[threadIdx.x] = threadIdx.x;
  cluster_sync();
  if (threadIdx.x == 0) store_shared_of(1 - emulator::cluster_rank(), &value, 0.0f);
  if (!wrong) cluster_sync();
}

__global__ void missing_cluster_barrier(float* out, const float*, bool wrong) {
  __shared__ float value;
  out[threadIdx.x] = threadIdx.x;
  cluster_sync();
  if (threadIdx.x == 0) store_shared_of(1 - emulator::cluster_rank(), &value, 0.0f);
  __syncthreads();
  if (!wrong) cluster_sync();
  if (value != 0.0f) out[threadIdx.x] = -1.0f;
  cluster_sync();
}

__global__ void nothing(float* out, const float*, bool) { out[threadIdx.x] = threadIdx.x; }

struct Planted {
  const char* name;
  void (*kernel)(float*, const float*, bool);
  unsigned cluster;
};

#define PLANTED(kernel, cluster) {#kernel, kernel, cluster}
constexpr Planted kPlanted[] = {
    PLANTED(missing_barrier, 0),      PLANTED(missing_second_barrier, 0), PLANTED(missing_wait, 0),
    PLANTED(wait_for_too_few, 0),     PLANTED(wait_without_barrier, 0),   PLANTED(copy_too_soon, 0),
    PLANTED(shuffle_from_outside, 0), PLANTED(divergent_collectives, 0),  PLANTED(divergent_product, 0),
    PLANTED(exited_lane, 0),          PLANTED(exited_thread, 0),          PLANTED(barrier_in_a_branch, 0),
    PLANTED(not_in_the_mask, 0),      PLANTED(misaligned_copy, 0),        PLANTED(copy_of_too_much, 0),
    PLANTED(copy_beyond_shared, 0),   PLANTED(misaligned_matrix_row, 0),  PLANTED(misaligned_vector, 0),
    PLANTED(index_beyond_array, 0),   PLANTED(beyond_dynamic_shared, 0),  PLANTED(null_pointer, 0),
    PLANTED(store_before_start, 2),   PLANTED(store_after_exit, 2),       PLANTED(missing_cluster_barrier, 2),
};

}  // namespace

// numbers: 0, 1, 2 ..., at least 256 of them, at a multiple of 16.
LORAKERN_EXPORT const char* planted(const char* name, float* out, const float* numbers, bool wrong) {
  for (const Planted& p : kPlanted) {
    if (strcmp(p.name, name) == 0) {
      return launch(p.kernel, p.cluster ? p.cluster : 1, kThreads, 16 * kThreads, p.cluster, out, numbers, wrong);
    }
  }
  return "no such kernel";
}

// A launch that asks for this much, with the limit raised first where `limit` is not 0.
LORAKERN_EXPORT const char* ask_for(float* out, int grid, int threads, int dynamic_shared, int cluster, int limit) {
  if (cudaFuncSetAttribute(nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, limit ? limit : 48 << 10)) {
    return cudaGetErrorString(cudaGetLastError());
  }
  return launch(nothing, grid, threads, dynamic_shared, cluster, out, nullptr, false);
}
