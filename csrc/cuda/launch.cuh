// launch.h for one dtype: which kernel, how many blocks to a group, how many groups.
//
// None of these choices changes a bit of the result: a token's sums have one order in every kernel (lora.cuh).
#pragma once
#include <initializer_list>

#include "decode.cuh"
#include "launch.h"
#include "mixture.cuh"
#include "prefill.cuh"

namespace lorakern::cuda {

// Groups are split until there are about this many blocks to a multiprocessor. Up to four are there at a time; more
// of them, and so smaller ones, leave less of a last round to wait for.
constexpr int kBlocksEach = 6;

constexpr int kPortableCluster = 8;

// decode.cuh serves up to so many pairs, or one to a slot on average, prefill.cuh the rest; a cluster grows while
// there are at most so many blocks to a multiprocessor. Chosen on an H200.
constexpr int kDecodePairs = 512;
constexpr double kDecodeBlocksEach = 1.7;  // two have room, but clusters do not fill every multiprocessor
constexpr double kPrefillBlocksEach = 2.1;

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

  // Pairs to a group: more where there are many, and the shared memory holds them.
  int group_tokens() const { return pairs() > 64 && bytes<32>(1) <= device.dynamic_bytes ? 32 : 8; }

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

  // Do decode.cuh and prefill.cuh serve the call?
  bool in_chunks_of_16() const {
    if (p.x == nullptr || p.y == nullptr || p.routing.num_choices > 1) return false;
    if (p.routing.r_max > kRankTile || p.d_in >= 1 << 30 || p.d_in % kPerChunk<T> != 0) return false;
    bool chunks =
        in_chunks(static_cast<const T*>(p.x), p.x_stride) && in_chunks(static_cast<const T*>(p.y), p.y_stride);
    for (int slice = 0; slice < p.num_slices; ++slice) {
      for (const Weight& w : {p.A[slice], p.B[slice]}) {
        chunks = chunks && in_chunks(static_cast<const T*>(w.data), w.row_stride) && w.slot_stride % kPerChunk<T> == 0;
      }
      chunks = chunks && p.B[slice].rows % kPerChunk<T> == 0 && p.B[slice].rows < 1 << 30;
    }
    return chunks;
  }

  // Up to `most` blocks to a group, as long as there are not more than `each` to a multiprocessor that have something
  // to do. Slices count by their size.
  int blocks_of(int tokens, int most, double each) const {
    int64_t rows = 0, most_rows = 0;
    for (int slice = 0; slice < p.num_slices; ++slice) {
      rows += p.B[slice].rows;
      most_rows = std::max(most_rows, p.B[slice].rows);
    }
    const double slices = static_cast<double>(p.num_slices * p.d_in + rows) / (p.d_in + most_rows);
    const double groups = slices * std::min(pairs(), pairs() / tokens + p.routing.num_slots);
    int blocks = 1;
    while (blocks * 2 <= std::min(most, device.max_cluster) && groups * blocks * 2 <= each * device.multiprocessors) {
      blocks *= 2;
    }
    return blocks;
  }

  cudaError_t decode() const {
    const int blocks = blocks_of(8, kParts, kDecodeBlocksEach);
    const Groups groups = groups_of<8>(p.routing);
    ClusterLaunch launch(groups.count * blocks, blocks, p.num_slices, decode_bytes(p.routing.r_max, blocks), stream);
    return cudaLaunchKernelEx(&launch.config, cuda::decode<T>, p, blocks, groups.step);
  }

  cudaError_t prefill() const {
    const int blocks = blocks_of(64, kPrefillBlocks, kPrefillBlocksEach);
    const Groups groups = groups_of<64>(p.routing);
    ClusterLaunch launch(groups.count * blocks, blocks, p.num_slices, prefill_bytes(p.routing.r_max, blocks), stream);
    return cudaLaunchKernelEx(&launch.config, cuda::prefill<T>, p, blocks, groups.step);
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
    if constexpr (sizeof(T) == 2) {
      if (in_chunks_of_16()) {
        const bool few = pairs() <= std::max<int64_t>(kDecodePairs, p.routing.num_slots);
        if (few && device.max_cluster > 1) return decode();
        if (!few && in_one_launch()) return prefill();
      }
    }
    return group_tokens() == 32 ? grouped<32>() : grouped<8>();
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
  BgmvParams call = p;
  // Few pairs are found faster without a plan, unless it leaves far fewer numbers of groups.
  const int64_t pairs = pairs_of(p.routing);
  if (pairs <= kUnplannedPairs && 2 * (pairs / 8 + p.routing.num_slots + 1) > pairs) call.routing.plan = {};
  return Launcher<T>{call, device, stream}.run();
}

template <typename T>
int planes_of(const BgmvParams& p, const Device& device) {
  return Launcher<T>{p, device, nullptr}.planes();
}

// All shared memory that the device has, for a kernel; lowers dynamic_bytes to what it leaves to a launch.
inline cudaError_t take_shared_memory(const void* kernel, Device* device) {
  cudaFuncAttributes attributes;
  if (cudaError_t error = cudaFuncGetAttributes(&attributes, kernel)) return error;
  const int room = device->shared_bytes - static_cast<int>(attributes.sharedSizeBytes);
  device->dynamic_bytes = std::min(device->dynamic_bytes, room);
  if (cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, room)) return error;
  // what several blocks need at a time, too
  return cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 100);
}

// Lets a kernel have the largest clusters; lowers max_cluster where the device has no room for them.
template <typename Kernel>
cudaError_t take_clusters(Kernel kernel, int dynamic_bytes, Device* device) {
  if (device->max_cluster <= kPortableCluster) return cudaSuccess;
  if (cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1)) return error;
  // not every device, or part of one, has that many multiprocessors side by side
  ClusterLaunch launch(device->max_cluster, device->max_cluster, 1, dynamic_bytes, nullptr);
  int clusters = 0;
  if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &launch.config) != cudaSuccess || clusters == 0) {
    cudaGetLastError();
    device->max_cluster = kPortableCluster;
  }
  return cudaSuccess;
}

template <typename T>
cudaError_t load_bgmv(Device* device) {
  cudaError_t error = cudaSuccess;
  for (const void* kernel :
       {reinterpret_cast<const void*>(lora<T, 8>), reinterpret_cast<const void*>(lora<T, 32>),
        reinterpret_cast<const void*>(mixture<T, 8>), reinterpret_cast<const void*>(mixture<T, 32>)}) {
    if (!error) error = take_shared_memory(kernel, device);
  }
  for (auto kernel : {lora<T, 8>, lora<T, 32>}) {
    if (!error) error = take_clusters(kernel, layout_of<T, 32>(kRankTile, kParts).total, device);
  }
  if constexpr (sizeof(T) == 2) {
    if (!error) error = take_shared_memory(reinterpret_cast<const void*>(decode<T>), device);
    if (!error) error = take_shared_memory(reinterpret_cast<const void*>(prefill<T>), device);
    if (!error) error = take_clusters(decode<T>, decode_bytes(kRankTile, device->max_cluster), device);
  }
  return error;
}

}  // namespace lorakern::cuda
