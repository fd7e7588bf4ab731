// launch.h for one dtype: which kernel, how many blocks to a group, how many groups.
//
// None of these choices changes a bit of the result: a token's sums have one order in every kernel (lora.cuh).
#pragma once
#include <initializer_list>

#include "launch.h"
#include "mixture.cuh"

namespace lorakern::cuda {

// Groups are split until there are about this many blocks to a multiprocessor. Up to four are there at a time; more
// of them, and so smaller ones, leave less of a last round to wait for.
constexpr int kBlocksEach = 6;

constexpr int kPortableCluster = 8;

// A launch of `blocks` blocks for each z, `cluster` of them to a cluster.
struct ClusterLaunch {
  cudaLaunchAttribute attribute = {};
  cudaLaunchConfig_t config = {};

  ClusterLaunch(int64_t blocks, int64_t cluster, int z, int shared_bytes, cudaStream_t stream) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    config.gridDim = dim3(static_cast<unsigned>(blocks), 1, static_cast<unsigned>(z));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = cluster > 1 ? 1 : 0;
  }
  ClusterLaunch(const ClusterLaunch&) = delete;  // config points into it
};

template <typename T>
struct Launcher {
  const BgmvParams& p;
  const Device& device;
  cudaStream_t stream;

  int64_t pairs() const { return pairs_of(p.routing); }

  // Groups times slices that have something to do, at most.
  int64_t work(int tokens) const { return std::min(pairs(), pairs() / tokens + p.routing.num_slots) * p.num_slices; }

  template <int N>
  int64_t bytes(int64_t blocks) const {
    return layout_of<T, N>(p.routing.r_max, blocks).total;
  }

  // Pairs to a group: more where there are many, and what the shared memory holds.
  int group_tokens() const {
    if (pairs() > 1024 && bytes<64>(1) <= device.dynamic_bytes) return 64;
    if (pairs() > 64 && bytes<32>(1) <= device.dynamic_bytes) return 32;
    return 8;
  }

  // Blocks to a group, up to `most`: enough to fill the device, most of them with columns of d_in.
  template <int N>
  int64_t blocks(int64_t most) const {
    int64_t count = 1;
    while (count * 2 <= most && work(N) * count * 2 <= int64_t{kBlocksEach} * device.multiprocessors &&
           (p.x == nullptr || part_length(p.d_in) * kParts / 2 < p.d_in) &&
           bytes<N>(count * 2) <= device.dynamic_bytes) {
      count *= 2;
    }
    return count;
  }

  // Without clusters a group is one block; where that leaves the device idle, shrink is a launch of its own.
  bool in_one_launch() const { return device.max_cluster > 1 || work(group_tokens()) >= device.multiprocessors; }

  int planes() const {
    if (p.routing.num_choices == 1 && in_one_launch()) return 0;
    return in_one_launch() ? 1 : kParts;
  }

  template <int N>
  cudaError_t lora(const BgmvParams& part, int64_t blocks, bool cluster) const {
    const Groups groups = groups_of<N>(part.routing);
    ClusterLaunch launch(groups.count * blocks, cluster ? blocks : 1, part.num_slices, bytes<N>(blocks), stream);
    return cudaLaunchKernelEx(&launch.config, cuda::lora<T, N>, part, static_cast<int>(blocks), groups.step);
  }

  template <int N>
  cudaError_t grouped() const {
    const bool clusters = device.max_cluster > 1;
    if (p.x == nullptr) return lora<N>(p, blocks<N>(kParts), false);
    if (in_one_launch() || (p.y == nullptr && p.num_planes == 1)) {
      return lora<N>(p, blocks<N>(clusters ? device.max_cluster : 1), true);
    }
    BgmvParams shrink = p, expand = p;
    shrink.y = nullptr;
    expand.x = nullptr;
    if (cudaError_t error = lora<N>(shrink, blocks<N>(kParts), false)) return error;
    return p.y == nullptr ? cudaSuccess : lora<N>(expand, blocks<N>(kParts), false);
  }

  cudaError_t grouped() const {
    const int tokens = group_tokens();
    return tokens == 64 ? grouped<64>() : tokens == 32 ? grouped<32>() : grouped<8>();
  }

  template <int N>
  cudaError_t mixture() const {
    int64_t columns = 0;
    for (int slice = 0; slice < p.num_slices; ++slice) columns = std::max(columns, p.B[slice].rows);
    constexpr int kColumns = MixtureShape<T, N>::kColumns;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>((p.routing.num_tokens + N - 1) / N),
                          static_cast<unsigned>((columns + kColumns - 1) / kColumns), p.num_slices);
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = MixtureShape<T, N>::bytes(p.routing.num_choices);
    config.stream = stream;
    return cudaLaunchKernelEx(&config, cuda::mixture<T, N>, p);
  }

  cudaError_t run() const {
    if (pairs() == 0 || p.routing.num_slots == 0 || p.routing.r_max == 0) return cudaSuccess;  // no row has an adapter
    if (p.routing.num_choices == 1 || p.y == nullptr) return grouped();
    if (p.x != nullptr) {
      BgmvParams shrink = p;
      shrink.y = nullptr;
      if (cudaError_t error = Launcher{shrink, device, stream}.grouped()) return error;
    }
    const bool many = p.routing.num_tokens > 64 && 32 * p.routing.num_choices <= 512 &&
                      MixtureShape<T, 32>::bytes(p.routing.num_choices) <= device.dynamic_bytes;
    return many ? mixture<32>() : mixture<8>();
  }
};

template <typename T>
cudaError_t launch_bgmv(const BgmvParams& p, const Device& device, cudaStream_t stream) {
  return Launcher<T>{p, device, stream}.run();
}

template <typename T>
int planes_of(const BgmvParams& p, const Device& device) {
  return Launcher<T>{p, device, nullptr}.planes();
}

template <typename T>
cudaError_t load_bgmv(Device* device) {
  for (const void* kernel : {reinterpret_cast<const void*>(lora<T, 8>), reinterpret_cast<const void*>(lora<T, 32>),
                             reinterpret_cast<const void*>(lora<T, 64>), reinterpret_cast<const void*>(mixture<T, 8>),
                             reinterpret_cast<const void*>(mixture<T, 32>)}) {
    cudaFuncAttributes attributes;
    if (cudaError_t error = cudaFuncGetAttributes(&attributes, kernel)) return error;
    const int room = device->shared_bytes - static_cast<int>(attributes.sharedSizeBytes);
    device->dynamic_bytes = std::min(device->dynamic_bytes, room);
    if (cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, room))
      return error;
    // what several blocks need at a time, too
    if (cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 100))
      return error;
  }
  for (auto kernel : {lora<T, 8>, lora<T, 32>, lora<T, 64>}) {
    if (device->max_cluster <= kPortableCluster) break;
    if (cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1))
      return error;
    // not every device, or part of one, has that many multiprocessors side by side
    ClusterLaunch launch(device->max_cluster, device->max_cluster, 1, layout_of<T, 32>(kRankTile, kParts).total,
                         nullptr);
    int clusters = 0;
    if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &launch.config) != cudaSuccess || clusters == 0) {
      cudaGetLastError();
      device->max_cluster = kPortableCluster;
    }
  }
  return cudaSuccess;
}

}  // namespace lorakern::cuda
