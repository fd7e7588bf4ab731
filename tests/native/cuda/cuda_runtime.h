// What our kernels and their launches use of CUDA C++, for g++ and the emulator. Semantics are those of NVIDIA's CUDA
// C++ Programming Guide and Runtime API reference; whatever is not used is not here.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <type_traits>

#include "emulator.h"

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __constant__ static
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
// One instance per block: the emulator puts it in place (see find_static_shared). Nothing else may be thread_local.
#define __shared__ static thread_local

// ---- Vectors

#define LORAKERN_VECTOR(name, type, alignment, ...) \
  struct alignas(alignment) name {                  \
    type __VA_ARGS__;                               \
  };                                                \
  template <typename... T>                          \
  constexpr name make_##name(T... v) {              \
    return {static_cast<type>(v)...};               \
  }
LORAKERN_VECTOR(int2, int, 8, x, y)
LORAKERN_VECTOR(int4, int, 16, x, y, z, w)
LORAKERN_VECTOR(uint2, unsigned, 8, x, y)
LORAKERN_VECTOR(uint4, unsigned, 16, x, y, z, w)
LORAKERN_VECTOR(ushort2, unsigned short, 4, x, y)
LORAKERN_VECTOR(ushort4, unsigned short, 8, x, y, z, w)
LORAKERN_VECTOR(longlong2, long long, 16, x, y)
LORAKERN_VECTOR(float2, float, 8, x, y)
LORAKERN_VECTOR(float3, float, 4, x, y, z)
LORAKERN_VECTOR(float4, float, 16, x, y, z, w)
LORAKERN_VECTOR(double2, double, 16, x, y)
#undef LORAKERN_VECTOR

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

constexpr int warpSize = emulator::kLanes;

#include "device_functions.h"

// ---- The runtime API

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorLaunchOutOfResources = 701,
  cudaErrorLaunchFailure = 719,
  cudaErrorNotSupported = 801,
  cudaErrorInvalidClusterSize = 912,
};

enum cudaDeviceAttr {
  cudaDevAttrMaxThreadsPerBlock = 1,
  cudaDevAttrMaxSharedMemoryPerBlock = 8,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrL2CacheSize = 38,
  cudaDevAttrMaxThreadsPerMultiProcessor = 39,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
  cudaDevAttrReservedSharedMemoryPerBlock = 111,
  cudaDevAttrClusterLaunch = 120,
};

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9,
  cudaFuncAttributeNonPortableClusterSizeAllowed = 13,
};

struct cudaFuncAttributes {
  size_t sharedSizeBytes, constSizeBytes, localSizeBytes;
  int maxThreadsPerBlock, numRegs, ptxVersion, binaryVersion, maxDynamicSharedSizeBytes;
};

enum cudaLaunchAttributeID {
  cudaLaunchAttributeClusterDimension = 4,
  cudaLaunchAttributeProgrammaticStreamSerialization = 6
};

union cudaLaunchAttributeValue {
  struct {
    unsigned x, y, z;
  } clusterDim;
  int programmaticStreamSerializationAllowed;
};

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};

using cudaStream_t = struct CUstream_st*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
// Of cudaErrorLaunchFailure: what the kernel did wrong.
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaMemsetAsync(void* memory, int byte, size_t bytes, cudaStream_t stream = nullptr);

namespace emulator {
cudaError_t launch(const void* function, const cudaLaunchConfig_t& config, std::function<void()> kernel);
cudaError_t set_attribute(const void* function, cudaFuncAttribute attribute, int value);
cudaError_t get_attributes(cudaFuncAttributes* attributes, const void* function);
cudaError_t max_active_blocks(int* blocks, size_t threads, size_t dynamic_shared);
cudaError_t max_active_clusters(int* clusters, const void* function, const cudaLaunchConfig_t& config);
}  // namespace emulator

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const std::tuple<Parameters...> copies(std::forward<Arguments>(arguments)...);
  return emulator::launch(reinterpret_cast<const void*>(kernel), *config, [&] { std::apply(kernel, copies); });
}

template <typename Function>
cudaError_t cudaFuncSetAttribute(Function* function, cudaFuncAttribute attribute, int value) {
  return emulator::set_attribute(reinterpret_cast<const void*>(function), attribute, value);
}

template <typename Function>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Function* function) {
  return emulator::get_attributes(attributes, reinterpret_cast<const void*>(function));
}

template <typename Function>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Function*, int threads, size_t dynamic_shared) {
  return emulator::max_active_blocks(blocks, threads, dynamic_shared);
}

template <typename Function>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Function* function, const cudaLaunchConfig_t* config) {
  return emulator::max_active_clusters(clusters, reinterpret_cast<const void*>(function), *config);
}
