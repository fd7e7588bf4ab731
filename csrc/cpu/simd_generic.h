// Vec for any CPU: four floats in the compiler's own vector type (SSE2, NEON, ...).
#pragma once
#include "scalar.h"

namespace {

constexpr int kWidth = 4;
constexpr int kTileTokens = 4, kTileVecs = 2;  // fit in 16 registers

typedef float Raw __attribute__((vector_size(16), aligned(4)));
struct Vec {
  Raw v;
};

inline Vec vec_zero() { return {Raw{0, 0, 0, 0}}; }
inline Vec vec_set(float a) { return {Raw{a, a, a, a}}; }
inline Vec vec_add(Vec a, Vec b) { return {a.v + b.v}; }
inline Vec vec_fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
// out[i] = the sum of all lanes of a[i], for four vectors at once.
inline void vec_sum4(const Vec* a, float* out) {
  for (int i = 0; i < 4; ++i) out[i] = (a[i].v[0] + a[i].v[2]) + (a[i].v[1] + a[i].v[3]);
}
inline Vec vec_load(const float* p) { return {*reinterpret_cast<const Raw*>(p)}; }
inline void vec_store(float* p, Vec a) { *reinterpret_cast<Raw*>(p) = a.v; }

template <typename T>
inline Vec vec_load(const T* p) {
  return {Raw{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}};
}

template <typename T>
inline void vec_store(T* p, Vec a) {
  for (int i = 0; i < 4; ++i) from_float(a.v[i], p + i);
}

typedef double WideRaw __attribute__((vector_size(16), aligned(8)));
struct Wide {  // kWidth / 2 float64
  WideRaw v;
};
constexpr int kWideRows = 4;  // of a tile of kWidth columns: eight sums fit in 16 registers

inline Wide wide_zero() { return {WideRaw{0, 0}}; }
inline Wide wide_set(double a) { return {WideRaw{a, a}}; }
inline Wide wide_add(Wide a, Wide b) { return {a.v + b.v}; }
inline Wide wide_fma(Wide a, Wide b, Wide c) { return {a.v * b.v + c.v}; }
inline Wide wide_load(const double* p) { return {*reinterpret_cast<const WideRaw*>(p)}; }
inline void wide_store(double* p, Wide a) { *reinterpret_cast<WideRaw*>(p) = a.v; }
inline Wide wide_low(Vec a) { return {WideRaw{a.v[0], a.v[1]}}; }
inline Wide wide_high(Vec a) { return {WideRaw{a.v[2], a.v[3]}}; }

inline void vec_transpose(Vec* rows) {
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < i; ++j) {
      const float other = rows[i].v[j];
      rows[i].v[j] = rows[j].v[i];
      rows[j].v[i] = other;
    }
}

}  // namespace

#include "simd_portable.h"

#include "simd_products.h"
