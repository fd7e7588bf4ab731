// csrc/cuda/ptx.cuh for the emulator: the same functions, documented there, with the place of the call for messages.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "emulator.h"

namespace emulator {
void load_matrices(Site site, uint32_t (&out)[4], const void* row);
enum class Factor { kHalf, kBFloat16, kTf32 };
void multiply(Site site, Factor factor, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
uint32_t round_tf32(float value);
}  // namespace emulator

namespace lorakern::cuda {

using emulator::Site;

using Shared = char*;

inline Shared shared_place(void* pointer) { return static_cast<char*>(pointer); }

inline void copy_async(void* shared, const void* global, int bytes, Site site = Site::here()) {
  emulator::copy_async(site, shared, global, bytes);
}

inline void commit_copies() { emulator::commit_copies(); }

template <int kPending>
void wait_copies() {
  static_assert(kPending >= 0);
  emulator::wait_copies(kPending);
}

inline void load_matrices(uint32_t (&out)[4], const void* row, Site site = Site::here()) {
  emulator::load_matrices(site, out, row);
}

template <typename T>
void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site = Site::here()) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
  constexpr auto kFactor = std::is_same_v<T, __half> ? emulator::Factor::kHalf : emulator::Factor::kBFloat16;
  emulator::multiply(site, kFactor, c, a, b0, b1);
}

inline uint32_t round_tf32(float value) { return emulator::round_tf32(value); }

inline void multiply_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site = Site::here()) {
  emulator::multiply(site, emulator::Factor::kTf32, c, a, b0, b1);
}

inline void cluster_sync(Site site = Site::here()) { emulator::meet_cluster(site); }

inline void store_shared_of(uint32_t rank, float* shared, float value, Site site = Site::here()) {
  emulator::store_shared_of(site, rank, shared, &value, sizeof value);
}

inline void store_shared_of(uint32_t rank, float4* shared, float4 value, Site site = Site::here()) {
  emulator::store_shared_of(site, rank, shared, &value, sizeof value);
}

inline void cluster_meet(Site site = Site::here()) { emulator::meet_cluster(site); }

// What is sent arrives at once, and is waited for until all of the cluster do: `arrivals` shows whether it was counted
// right, not whether anybody reads too early.
inline void expect_bytes(uint64_t* arrivals, int bytes, Site site = Site::here()) {
  emulator::expect_bytes(site, arrivals, bytes);
}

inline void send_to(uint32_t rank, float2* shared, float2 value, uint64_t* arrivals, Site site = Site::here()) {
  emulator::send_to(site, rank, shared, &value, sizeof value, arrivals);
}

inline void await_bytes(uint64_t* arrivals, Site site = Site::here()) { emulator::await_bytes(site, arrivals); }

inline char* dynamic_shared() { return emulator::dynamic_shared(); }

}  // namespace lorakern::cuda
