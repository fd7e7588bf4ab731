// A launch for the kernels of this folder, which Python calls through ctypes.
#pragma once
#include <cuda_runtime.h>

// What CUDA has to say against it, or null. A cluster of 0 blocks: without the attribute.
template <typename... Parameters, typename... Arguments>
const char* launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t dynamic_shared, unsigned cluster,
                   Arguments... arguments) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {cluster, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = dynamic_shared;
  config.attrs = &attribute;
  config.numAttrs = cluster > 0 ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  return error ? cudaGetErrorString(error) : nullptr;
}

#define LORAKERN_EXPORT extern "C" __attribute__((visibility("default")))
