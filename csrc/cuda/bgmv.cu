// The entry points of params.h: devices, dtypes, errors.
#include <array>
#include <mutex>

#include "common.cuh"
#include "launch.h"

namespace lorakern::cuda {
namespace {

constexpr int kMaxDevices = 64;

cudaError_t load(int index, Device* device) {
  int major = 0;
  cudaError_t error = cudaSetDevice(index);
  if (!error) error = cudaDeviceGetAttribute(&device->multiprocessors, cudaDevAttrMultiProcessorCount, index);
  if (!error) error = cudaDeviceGetAttribute(&device->shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  if (!error) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
  device->dynamic_bytes = device->shared_bytes;
  device->max_cluster = major >= 9 ? 16 : 1;
  for (Dtype dtype : {Dtype::kFloat32, Dtype::kFloat16, Dtype::kBFloat16}) {
    if (!error) error = with_dtype(dtype, [&](auto zero) { return load_bgmv<decltype(zero)>(device); });
  }
  if (!error) error = load_backward();
  if (!error) error = load_plan();
  return error;
}

// The kernels are loaded when a device is first asked for.
cudaError_t get(int index, const Device** device) {
  static std::mutex mutex;
  static std::array<Device, kMaxDevices> devices;
  static std::array<bool, kMaxDevices> loaded;
  if (index < 0 || index >= kMaxDevices) return cudaErrorInvalidDevice;
  const std::lock_guard<std::mutex> lock(mutex);
  if (!loaded[index]) {
    if (cudaError_t error = load(index, &devices[index])) return error;
    loaded[index] = true;
  }
  *device = &devices[index];
  return cudaSetDevice(index);
}

}  // namespace

const char* bgmv(const BgmvParams& params, int device, void* stream) {
  const Device* found = nullptr;
  if (cudaError_t error = get(device, &found)) return describe(error);
  return describe(with_dtype(params.dtype, [&](auto zero) {
    return launch_bgmv<decltype(zero)>(params, *found, static_cast<cudaStream_t>(stream));
  }));
}

const char* planes(const BgmvParams& params, int device, int* count) {
  const Device* found = nullptr;
  if (cudaError_t error = get(device, &found)) return describe(error);
  return describe(with_dtype(params.dtype, [&](auto zero) {
    *count = planes_of<decltype(zero)>(params, *found);
    return cudaSuccess;
  }));
}

const char* preload(int device) {
  const Device* found = nullptr;
  return describe(get(device, &found));
}

const char* problem() {
  int devices = 0;
  return describe(cudaGetDeviceCount(&devices));
}

}  // namespace lorakern::cuda
