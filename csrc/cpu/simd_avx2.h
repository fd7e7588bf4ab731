// Vec for AVX2 + FMA + F16C: eight floats.
#pragma once
#include <immintrin.h>

#include "scalar.h"

namespace {

constexpr int kWidth = 8;
constexpr int kTileTokens = 4, kTileVecs = 3;  // 12 sums, 3 operands and a broadcast fit in 16 registers

struct Vec {
  __m256 v;
};

inline Vec vec_zero() { return {_mm256_setzero_ps()}; }
inline Vec vec_set(float a) { return {_mm256_set1_ps(a)}; }
inline Vec vec_add(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec vec_fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }

// out[i] = the sum of all lanes of a[i], for four vectors at once.
inline void vec_sum4(const Vec* a, float* out) {
  const __m256 low = _mm256_add_ps(_mm256_unpacklo_ps(a[0].v, a[1].v), _mm256_unpackhi_ps(a[0].v, a[1].v));
  const __m256 high = _mm256_add_ps(_mm256_unpacklo_ps(a[2].v, a[3].v), _mm256_unpackhi_ps(a[2].v, a[3].v));
  const __m256 quads = _mm256_add_ps(_mm256_shuffle_ps(low, high, 0x44), _mm256_shuffle_ps(low, high, 0xEE));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(quads), _mm256_extractf128_ps(quads, 1)));
}

inline __m128i load_16(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }

inline Vec vec_load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline Vec vec_load(const f16* p) { return {_mm256_cvtph_ps(load_16(p))}; }
inline Vec vec_load(const bf16* p) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_16(p)), 16))};
}

inline void vec_store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
inline void vec_store(f16* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
inline void vec_store(bf16* p, Vec a) {
  const __m256i bits = _mm256_castps_si256(a.v),
                odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}

struct Wide {  // kWidth / 2 float64
  __m256d v;
};
constexpr int kWideRows = 4;  // of a tile of kWidth columns: eight sums, 2 operands and a broadcast

inline Wide wide_zero() { return {_mm256_setzero_pd()}; }
inline Wide wide_set(double a) { return {_mm256_set1_pd(a)}; }
inline Wide wide_add(Wide a, Wide b) { return {_mm256_add_pd(a.v, b.v)}; }
inline Wide wide_fma(Wide a, Wide b, Wide c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
inline Wide wide_load(const double* p) { return {_mm256_loadu_pd(p)}; }
inline void wide_store(double* p, Wide a) { _mm256_storeu_pd(p, a.v); }
inline Wide wide_low(Vec a) { return {_mm256_cvtps_pd(_mm256_castps256_ps128(a.v))}; }
inline Wide wide_high(Vec a) { return {_mm256_cvtps_pd(_mm256_extractf128_ps(a.v, 1))}; }

inline void vec_transpose(Vec* r) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps(r[i].v, r[i + 1].v);
    a[i + 1] = _mm256_unpackhi_ps(r[i].v, r[i + 1].v);
  }
  for (int i = 0; i < 8; i += 4) {
    b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xEE);
    b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xEE);
  }
  for (int i = 0; i < 4; ++i) {
    r[i].v = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
    r[i + 4].v = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
  }
}

}  // namespace

#include "simd_portable.h"

#include "simd_products.h"
