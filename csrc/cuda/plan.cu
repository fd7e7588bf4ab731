// The stable counting sort of pairs by slot, in one launch. A block places the pairs of a few neighbouring keys (slots,
// and one more key for the pairs without an adapter) and looks at all pairs twice: first how many there are of smaller
// keys and, in each warp's part, of its own; then where these go.
#include <ptx.cuh>

#include "common.cuh"
#include "launch.h"

namespace lorakern::cuda {
namespace {

constexpr int kWarps = 32;
constexpr int kThreads = kWarps * kWarp;
constexpr int kMaxKeys = 64;  // of a block
constexpr int kBlocks = 128;  // as many as run at once anywhere
constexpr int kAhead = 4;     // indices that a thread loads before it looks at the first

// Calls visit(key, lanes, pair) for this lane's pair in begin .. end - 1 and each key among `keys` from `first` on that
// lanes of the warp have: `lanes` are those, `pair` is of this lane. Returns how many pairs of this lane have smaller
// keys.
template <typename Visit>
__device__ int scan(const Routing& r, int64_t begin, int64_t end, int64_t first, int64_t keys, Visit visit) {
  const int lane = threadIdx.x % kWarp;
  int smaller = 0;
  for (int64_t at = begin; at < end; at += kAhead * kWarp) {
    int64_t key[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t pair = at + i * kWarp + lane;
      const int slot = pair < end ? slot_of(r, pair) : 0;
      key[i] = (pair >= end ? r.num_slots + 1 : slot < 0 ? r.num_slots : slot) - first;
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      smaller += key[i] < 0;
      const bool own = key[i] >= 0 && key[i] < keys;
      for (uint32_t waiting = __ballot_sync(0xffffffffu, own); waiting != 0;) {
        const int next = __shfl_sync(0xffffffffu, static_cast<int>(key[i]), __ffs(waiting) - 1);
        const uint32_t lanes = __ballot_sync(0xffffffffu, key[i] == next);
        waiting &= ~lanes;
        visit(next, lanes, at + i * kWarp + lane);
      }
    }
  }
  return smaller;
}

__global__ void __launch_bounds__(kThreads, 1)
    place(const __grid_constant__ Routing r, int32_t* order, int32_t* starts, int64_t keys_per_block) {
  __shared__ int counts[kMaxKeys][kWarps + 1];  // of a key in a warp's part; then where the warp places the next one
  __shared__ int smaller[kWarps];               // pairs of smaller keys in a warp's part
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  const int64_t pairs = pairs_of(r);
  const int64_t part = (pairs + kWarps - 1) / kWarps, begin = min(warp * part, pairs), end = min(begin + part, pairs);
  for (int64_t first = blockIdx.x * keys_per_block; first <= r.num_slots; first += gridDim.x * keys_per_block) {
    const int keys = static_cast<int>(min(keys_per_block, r.num_slots + 1 - first));
    for (int i = thread; i < kMaxKeys * (kWarps + 1); i += kThreads) counts[i / (kWarps + 1)][i % (kWarps + 1)] = 0;
    __syncthreads();
    int less = scan(r, begin, end, first, keys, [&](int key, uint32_t lanes, int64_t) {
      if (lane == 0) counts[key][warp] += __popc(lanes);
    });
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) less += __shfl_xor_sync(0xffffffffu, less, lanes);
    if (lane == 0) smaller[warp] = less;
    __syncthreads();
    // counts[key][kWarps] = all of the key; then every count becomes the sum of those before it.
    if (thread < keys) {
      for (int w = 0; w < kWarps; ++w) counts[thread][kWarps] += counts[thread][w];
    }
    __syncthreads();
    if (thread < keys) {
      int position = 0;
      for (int w = 0; w < kWarps; ++w) position += smaller[w];
      for (int key = 0; key < thread; ++key) position += counts[key][kWarps];
      starts[first + thread] = position;
      for (int w = 0; w < kWarps; ++w) {
        const int count = counts[thread][w];
        counts[thread][w] = position;
        position += count;
      }
    }
    __syncthreads();
    scan(r, begin, end, first, keys, [&](int key, uint32_t lanes, int64_t pair) {
      const int position = counts[key][warp];
      if (lanes >> lane & 1) order[position + __popc(lanes & ((1u << lane) - 1))] = static_cast<int32_t>(pair);
      __syncwarp();
      if (lane == 0) counts[key][warp] = position + __popc(lanes);
      __syncwarp();
    });
    __syncthreads();  // before the next round overwrites counts
  }
}

}  // namespace

const char* plan(const Routing& routing, int32_t* order, int32_t* starts, int device, void* stream) {
  if (cudaError_t error = cudaSetDevice(device)) return describe(error);
  const int64_t keys = routing.num_slots + 1;
  const int64_t keys_per_block = std::clamp<int64_t>((keys + kBlocks - 1) / kBlocks, 1, kMaxKeys);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(std::min<int64_t>((keys + keys_per_block - 1) / keys_per_block, 65535)));
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(stream);
  return describe(cudaLaunchKernelEx(&config, place, routing, order, starts, keys_per_block));
}

cudaError_t load_plan() { return load_kernels(place); }

}  // namespace lorakern::cuda
