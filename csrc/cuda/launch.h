// What the host decides about a call, and the entry points that are compiled per dtype (bgmv_*.cu).
#pragma once
#include <cuda_runtime.h>

#include "params.h"

namespace lorakern::cuda {

struct Device {
  int multiprocessors;
  int shared_bytes;   // that a block may use
  int dynamic_bytes;  // of those, what every kernel leaves to its launch
  int max_cluster;    // blocks; 1 where there are no clusters
};

template <typename T>
cudaError_t launch_bgmv(const BgmvParams& p, const Device& device, cudaStream_t stream);

// Planes of h that launch_bgmv needs as scratch: 0 where one launch does it all.
template <typename T>
int planes_of(const BgmvParams& p, const Device& device);

// Loads the kernels, lets them use all shared memory of the device, and lowers dynamic_bytes and max_cluster to what
// they can have.
template <typename T>
cudaError_t load_bgmv(Device* device);

cudaError_t load_backward();
cudaError_t load_plan();

}  // namespace lorakern::cuda
