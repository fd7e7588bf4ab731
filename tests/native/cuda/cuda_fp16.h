// float16 for the emulator: storage and conversions, rounding to nearest even as the hardware does.
#pragma once
#include <cstdint>

#include "cuda_runtime.h"

namespace emulator {
uint16_t half_bits(float v);  // NaN becomes 0x7fff
float half_value(uint16_t bits);
}  // namespace emulator

struct __half {
  uint16_t bits;
  __half() = default;
  __half(float v) : bits(emulator::half_bits(v)) {}
  operator float() const { return emulator::half_value(bits); }
};
using half = __half;

struct alignas(4) __half2 {
  __half x, y;
};
using half2 = __half2;

inline __half __float2half_rn(float v) { return __half(v); }
inline __half __float2half(float v) { return __half(v); }
inline float __half2float(__half v) { return v; }
inline uint16_t __half_as_ushort(__half v) { return v.bits; }
inline __half __ushort_as_half(uint16_t bits) { return lorakern_bits<__half>(bits); }

inline __half2 __halves2half2(__half low, __half high) { return {low, high}; }
inline __half2 __floats2half2_rn(float low, float high) { return {__half(low), __half(high)}; }
inline __half2 __float22half2_rn(float2 v) { return {__half(v.x), __half(v.y)}; }
inline __half2 __float2half2_rn(float v) { return {__half(v), __half(v)}; }
inline float2 __half22float2(__half2 v) { return {v.x, v.y}; }
inline float __low2float(__half2 v) { return v.x; }
inline float __high2float(__half2 v) { return v.y; }
inline __half __low2half(__half2 v) { return v.x; }
inline __half __high2half(__half2 v) { return v.y; }
