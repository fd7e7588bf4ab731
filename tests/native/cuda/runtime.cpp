// The runtime API: a device with the limits of an A100 (sm_80) or an H100 (sm_90), on which every launch runs at once.
#include "cuda_runtime.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>

namespace {

struct Device {
  int major, multiprocessors, threads_per_multiprocessor, shared_per_multiprocessor, shared_optin, l2;
};

constexpr int kShared = 48 << 10;         // of a block that has not asked for more
constexpr int kReservedShared = 1 << 10;  // of every block, by CUDA itself
constexpr int kBlocksPerMultiprocessor = 32;
constexpr unsigned kPortableCluster = 8, kLargestCluster = 16;

Device device() {
  if (emulator::arch() >= 90) return {9, 132, 2048, 228 << 10, 227 << 10, 50 << 20};
  return {8, 108, 2048, 164 << 10, 163 << 10, 40 << 20};
}

struct Function {
  int max_dynamic_shared = kShared;
  bool large_clusters = false;
};

std::mutex mutex;
std::map<const void*, Function> functions;
cudaError_t last_error = cudaSuccess;
const char* kernel_error = "";

cudaError_t report(cudaError_t error) {
  if (error) last_error = error;
  return error;
}

unsigned count(dim3 d) { return d.x * d.y * d.z; }

dim3 cluster_of(const cudaLaunchConfig_t& config) {
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    if (config.attrs[i].id != cudaLaunchAttributeClusterDimension) continue;
    const auto& cluster = config.attrs[i].val.clusterDim;
    return {cluster.x, cluster.y, cluster.z};
  }
  return {};
}

bool has_cluster(const cudaLaunchConfig_t& config) {
  return std::any_of(config.attrs, config.attrs + config.numAttrs,
                     [](const auto& a) { return a.id == cudaLaunchAttributeClusterDimension; });
}

cudaError_t check(const void* function, const cudaLaunchConfig_t& config) {
  const std::lock_guard<std::mutex> lock(mutex);
  const dim3 grid = config.gridDim, block = config.blockDim, cluster = cluster_of(config);
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  if (block.x == 0 || block.y == 0 || block.z == 0 || block.x > 1024 || block.y > 1024 || block.z > 64 ||
      count(block) > 1024) {
    return cudaErrorInvalidConfiguration;
  }
  const Function& f = functions[function];
  if (config.dynamicSmemBytes > static_cast<size_t>(f.max_dynamic_shared)) return cudaErrorInvalidValue;
  if (!has_cluster(config)) return cudaSuccess;
  if (device().major < 9) return cudaErrorNotSupported;
  if (count(cluster) == 0 || count(cluster) > (f.large_clusters ? kLargestCluster : kPortableCluster)) {
    return cudaErrorInvalidClusterSize;
  }
  const bool whole = grid.x % cluster.x == 0 && grid.y % cluster.y == 0 && grid.z % cluster.z == 0;
  return whole ? cudaSuccess : cudaErrorInvalidClusterSize;
}

emulator::Dim dim(dim3 d) { return {d.x, d.y, d.z}; }

}  // namespace

namespace emulator {

cudaError_t launch(const void* function, const cudaLaunchConfig_t& config, std::function<void()> kernel) {
  if (const cudaError_t error = check(function, config)) return report(error);
  const char* error = run(
      {dim(config.gridDim), dim(config.blockDim), dim(cluster_of(config)), config.dynamicSmemBytes, std::move(kernel)});
  if (!error) return cudaSuccess;
  kernel_error = error;
  return report(cudaErrorLaunchFailure);
}

cudaError_t set_attribute(const void* function, cudaFuncAttribute attribute, int value) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    const int room = device().shared_optin - static_cast<int>(static_shared());
    if (value < 0 || value > room) return report(cudaErrorInvalidValue);
    functions[function].max_dynamic_shared = value;
  } else if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) {
    functions[function].large_clusters = value != 0;
  }
  return cudaSuccess;
}

cudaError_t get_attributes(cudaFuncAttributes* attributes, const void* function) {
  const std::lock_guard<std::mutex> lock(mutex);
  *attributes = {};
  attributes->sharedSizeBytes = static_shared();
  attributes->maxThreadsPerBlock = 1024;
  attributes->binaryVersion = attributes->ptxVersion = arch();
  attributes->maxDynamicSharedSizeBytes = functions[function].max_dynamic_shared;
  return cudaSuccess;
}

cudaError_t max_active_blocks(int* blocks, size_t threads, size_t dynamic_shared) {
  const Device d = device();
  const auto by_shared = static_cast<int>(d.shared_per_multiprocessor / (dynamic_shared + kReservedShared));
  const auto by_threads = static_cast<int>(d.threads_per_multiprocessor / std::max<size_t>(threads, 1));
  *blocks = std::min({by_shared, by_threads, kBlocksPerMultiprocessor});
  return cudaSuccess;
}

cudaError_t max_active_clusters(int* clusters, const void* function, const cudaLaunchConfig_t& config) {
  if (const cudaError_t error = check(function, config)) return report(error);
  int blocks = 0;
  max_active_blocks(&blocks, count(config.blockDim), config.dynamicSmemBytes);
  *clusters = blocks * device().multiprocessors / static_cast<int>(count(cluster_of(config)));
  return cudaSuccess;
}

}  // namespace emulator

cudaError_t cudaGetDeviceCount(int* number) {
  *number = 1;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int number) { return report(number == 0 ? cudaSuccess : cudaErrorInvalidDevice); }

cudaError_t cudaGetDevice(int* number) {
  *number = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int number) {
  if (number != 0) return report(cudaErrorInvalidDevice);
  const Device d = device();
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      *value = 1024;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = kShared;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = static_cast<int>(emulator::setting("LORAKERN_EMULATOR_MULTIPROCESSORS", d.multiprocessors));
      return cudaSuccess;
    case cudaDevAttrL2CacheSize:
      *value = d.l2;
      return cudaSuccess;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = d.threads_per_multiprocessor;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = d.major;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = d.shared_per_multiprocessor;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = d.shared_optin;
      return cudaSuccess;
    case cudaDevAttrReservedSharedMemoryPerBlock:
      *value = kReservedShared;
      return cudaSuccess;
    case cudaDevAttrClusterLaunch:
      *value = d.major >= 9;
      return cudaSuccess;
  }
  return report(cudaErrorInvalidValue);
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

cudaError_t cudaPeekAtLastError() { return last_error; }

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorLaunchOutOfResources:
      return "too many resources requested for launch";
    case cudaErrorLaunchFailure:
      return kernel_error;
    case cudaErrorNotSupported:
      return "operation not supported";
    case cudaErrorInvalidClusterSize:
      return "invalid cluster size";
  }
  return "unknown error";
}

cudaError_t cudaMemsetAsync(void* memory, int byte, size_t bytes, cudaStream_t) {
  memset(memory, byte, bytes);
  return cudaSuccess;
}
