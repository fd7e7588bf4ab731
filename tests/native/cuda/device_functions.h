// The functions of CUDA C++ that need no declaration in device code: barriers, warps, atomics, bits, arithmetic.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "emulator.h"

// ---- Barriers

inline void __syncthreads(emulator::Site site = emulator::Site::here()) {
  emulator::meet_block("__syncthreads", site, false);
}
inline int __syncthreads_count(int predicate, emulator::Site site = emulator::Site::here()) {
  return emulator::meet_block("__syncthreads_count", site, predicate != 0);
}
inline int __syncthreads_or(int predicate, emulator::Site site = emulator::Site::here()) {
  return emulator::meet_block("__syncthreads_or", site, predicate != 0) > 0;
}
inline int __syncthreads_and(int predicate, emulator::Site site = emulator::Site::here()) {
  return emulator::meet_block("__syncthreads_and", site, predicate == 0) == 0;
}
inline void __syncwarp(uint32_t mask = 0xffffffff, emulator::Site site = emulator::Site::here()) {
  emulator::meet_warp("__syncwarp", site, mask, false, nullptr, nullptr);
}
inline void __threadfence() {}
inline void __threadfence_block() {}

// ---- Warps

namespace emulator {

struct Shuffle {
  uint64_t value;
  int source;  // a lane
};

void combine_shuffles(void* const (&lanes)[kLanes], uint32_t mask);
uint32_t ballot(const char* what, Site site, uint32_t mask, bool predicate);

template <typename T>
T shuffle(const char* what, Site site, uint32_t mask, T value, int source) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>);
  Shuffle s = {0, source};
  memcpy(&s.value, &value, sizeof(T));
  meet_warp(what, site, mask, false, &s, combine_shuffles);
  memcpy(&value, &s.value, sizeof(T));
  return value;
}

// The first lane of the segment of `width` lanes that the calling lane is in.
inline int segment(int width) { return static_cast<int>(lane()) & ~(width - 1); }

}  // namespace emulator

template <typename T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32, emulator::Site site = emulator::Site::here()) {
  return emulator::shuffle("__shfl_sync", site, mask, value, emulator::segment(width) | (source & (width - 1)));
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32, emulator::Site site = emulator::Site::here()) {
  const int self = static_cast<int>(emulator::lane()), source = self ^ bits;
  const bool beyond = source >= emulator::segment(width) + width;
  return emulator::shuffle("__shfl_xor_sync", site, mask, value, beyond ? self : source);
}
template <typename T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32, emulator::Site site = emulator::Site::here()) {
  const int self = static_cast<int>(emulator::lane()), source = self - static_cast<int>(delta);
  return emulator::shuffle("__shfl_up_sync", site, mask, value, source < emulator::segment(width) ? self : source);
}
template <typename T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32,
                   emulator::Site site = emulator::Site::here()) {
  const int self = static_cast<int>(emulator::lane()), source = self + static_cast<int>(delta);
  const bool beyond = source >= emulator::segment(width) + width;
  return emulator::shuffle("__shfl_down_sync", site, mask, value, beyond ? self : source);
}

inline uint32_t __ballot_sync(uint32_t mask, int predicate, emulator::Site site = emulator::Site::here()) {
  return emulator::ballot("__ballot_sync", site, mask, predicate != 0);
}
inline int __any_sync(uint32_t mask, int predicate, emulator::Site site = emulator::Site::here()) {
  return emulator::ballot("__any_sync", site, mask, predicate != 0) != 0;
}
inline int __all_sync(uint32_t mask, int predicate, emulator::Site site = emulator::Site::here()) {
  return emulator::ballot("__all_sync", site, mask, predicate == 0) == 0;
}

// ---- Atomics: fibers are not interrupted

template <typename T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address = old + value;
  return old;
}
template <typename T>
T atomicMax(T* address, T value) {
  const T old = *address;
  if (value > old) *address = value;
  return old;
}
template <typename T>
T atomicMin(T* address, T value) {
  const T old = *address;
  if (value < old) *address = value;
  return old;
}
template <typename T>
T atomicOr(T* address, T value) {
  const T old = *address;
  *address = old | value;
  return old;
}
template <typename T>
T atomicExch(T* address, T value) {
  const T old = *address;
  *address = value;
  return old;
}

// ---- Bits and loads

template <typename To, typename From>
To lorakern_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
inline float __uint_as_float(uint32_t v) { return lorakern_bits<float>(v); }
inline float __int_as_float(int v) { return lorakern_bits<float>(v); }
inline uint32_t __float_as_uint(float v) { return lorakern_bits<uint32_t>(v); }
inline int __float_as_int(float v) { return lorakern_bits<int>(v); }
inline int __popc(uint32_t v) { return __builtin_popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v == 0 ? 32 : __builtin_clz(static_cast<uint32_t>(v)); }

template <typename T>
T __ldg(const T* address) {
  return *address;
}
template <typename T>
T __ldcg(const T* address) {
  return *address;
}
template <typename T>
T __ldcs(const T* address) {
  return *address;
}
template <typename T>
void __stcs(T* address, T value) {
  *address = value;
}

// ---- Arithmetic

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __saturatef(float v) { return v > 0.0f ? (v < 1.0f ? v : 1.0f) : 0.0f; }

#define LORAKERN_MIN_MAX(type)                              \
  inline type min(type a, type b) { return b < a ? b : a; } \
  inline type max(type a, type b) { return a < b ? b : a; }
LORAKERN_MIN_MAX(int)
LORAKERN_MIN_MAX(unsigned)
LORAKERN_MIN_MAX(long)
LORAKERN_MIN_MAX(long long)
LORAKERN_MIN_MAX(unsigned long)
#undef LORAKERN_MIN_MAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
