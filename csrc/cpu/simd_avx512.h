// Vec for AVX-512 (F, BW, DQ, VL): sixteen floats. With AVX512-BF16 dot products take bf16 pairs as they are.
#pragma once
#include <immintrin.h>

#include "scalar.h"

namespace {

constexpr int kWidth = 16;
constexpr int kTileTokens = 6, kTileVecs = 4;  // 24 sums, 4 operands and a broadcast fit in 32 registers

struct Vec {
  __m512 v;
};

inline Vec vec_zero() { return {_mm512_setzero_ps()}; }
inline Vec vec_set(float a) { return {_mm512_set1_ps(a)}; }
inline Vec vec_add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec vec_fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }

// out[i] = the sum of all lanes of a[i], for four vectors at once.
inline void vec_sum4(const Vec* a, float* out) {
  const __m512 low = _mm512_add_ps(_mm512_unpacklo_ps(a[0].v, a[1].v), _mm512_unpackhi_ps(a[0].v, a[1].v));
  const __m512 high = _mm512_add_ps(_mm512_unpacklo_ps(a[2].v, a[3].v), _mm512_unpackhi_ps(a[2].v, a[3].v));
  const __m512 quads = _mm512_add_ps(_mm512_shuffle_ps(low, high, 0x44), _mm512_shuffle_ps(low, high, 0xEE));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(quads), _mm512_extractf32x8_ps(quads, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}

inline __m256i load_16(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

inline Vec vec_load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec vec_load(const f16* p) { return {_mm512_cvtph_ps(load_16(p))}; }
inline Vec vec_load(const bf16* p) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_16(p)), 16))};
}

inline void vec_store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline void vec_store(f16* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
#ifdef __AVX512BF16__
inline void vec_store(bf16* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a.v)));
}
#else
inline void vec_store(bf16* p, Vec a) {
  const __m512i bits = _mm512_castps_si512(a.v),
                odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512i high = _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, is_nan, quiet), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(high));
}
#endif

// The first n <= kWidth elements; the rest of the vector is zero, the rest of memory untouched.
inline __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }
inline __m256i load_16_n(const void* p, int n) { return _mm256_maskz_loadu_epi16(first(n), p); }
inline Vec vec_load_n(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
inline Vec vec_load_n(const f16* p, int n) { return {_mm512_cvtph_ps(load_16_n(p, n))}; }
inline Vec vec_load_n(const bf16* p, int n) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_16_n(p, n)), 16))};
}

inline void vec_store_n(float* p, Vec a, int n) { _mm512_mask_storeu_ps(p, first(n), a.v); }
template <typename T>
inline void vec_store_n(T* p, Vec a, int n) {
  T full[kWidth];
  vec_store(full, a);
  _mm256_mask_storeu_epi16(p, first(n), load_16(full));
}

struct Wide {  // kWidth / 2 float64
  __m512d v;
};
constexpr int kWideRows = 8;  // of a tile of kWidth columns: sixteen sums, 2 operands and a broadcast

inline Wide wide_zero() { return {_mm512_setzero_pd()}; }
inline Wide wide_set(double a) { return {_mm512_set1_pd(a)}; }
inline Wide wide_add(Wide a, Wide b) { return {_mm512_add_pd(a.v, b.v)}; }
inline Wide wide_fma(Wide a, Wide b, Wide c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
inline Wide wide_load(const double* p) { return {_mm512_loadu_pd(p)}; }
inline void wide_store(double* p, Wide a) { _mm512_storeu_pd(p, a.v); }
inline Wide wide_low(Vec a) { return {_mm512_cvtps_pd(_mm512_castps512_ps256(a.v))}; }
inline Wide wide_high(Vec a) { return {_mm512_cvtps_pd(_mm512_extractf32x8_ps(a.v, 1))}; }

inline void vec_transpose(Vec* r) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps(r[i].v, r[i + 1].v);
    a[i + 1] = _mm512_unpackhi_ps(r[i].v, r[i + 1].v);
  }
  for (int i = 0; i < 16; i += 4) {  // b[i + j]: column 4 q + j of rows i .. i + 3, for each 128-bit lane q
    b[i] = _mm512_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm512_shuffle_ps(a[i], a[i + 2], 0xEE);
    b[i + 2] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0xEE);
  }
  for (int j = 0; j < 4; ++j) {  // transpose the 4 x 4 grid of lanes
    const __m512 low01 = _mm512_shuffle_f32x4(b[j], b[j + 4], 0x44),
                 low23 = _mm512_shuffle_f32x4(b[j + 8], b[j + 12], 0x44);
    const __m512 high01 = _mm512_shuffle_f32x4(b[j], b[j + 4], 0xEE),
                 high23 = _mm512_shuffle_f32x4(b[j + 8], b[j + 12], 0xEE);
    r[j].v = _mm512_shuffle_f32x4(low01, low23, 0x88);
    r[j + 4].v = _mm512_shuffle_f32x4(low01, low23, 0xDD);
    r[j + 8].v = _mm512_shuffle_f32x4(high01, high23, 0x88);
    r[j + 12].v = _mm512_shuffle_f32x4(high01, high23, 0xDD);
  }
}

// The low and the high half of each 32-bit lane as float32.
inline void widen_pairs(bf16, __m512i pairs, Vec* out) {
  out[0].v = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
  out[1].v = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u))));
}
inline void widen_pairs(f16, __m512i pairs, Vec* out) {
  out[0].v = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(pairs));
  out[1].v = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(pairs, 16)));
}

// A block of 16 rows by `depth` <= 16 columns of 16-bit numbers, transposed as pairs: pairs[k] holds columns 2k and
// 2k + 1 of all rows. Unless kFull, rows from `live` on count as zero, and nothing beyond depth is read.
template <bool kFull>
ALWAYS_INLINE void transpose_pairs(const void* rows, int64_t stride, int live, int depth, __m512i* pairs) {
  __m512i a[8], b[8];
  const uint16_t* first = static_cast<const uint16_t*>(rows);
  const uint16_t* quarter[4] = {first, first + 4 * stride, first + 8 * stride, first + 12 * stride};
  const auto row = [&](int i) ALWAYS_INLINE_LAMBDA {
    const uint16_t* p = quarter[i / 4] + i % 4 * stride;
    return kFull ? load_16(p) : i < live ? load_16_n(p, depth) : _mm256_setzero_si256();
  };
  for (int i = 0; i < 8; ++i) {  // rows 0 1 2 3 8 9 10 11, each with the row four below it
    const int r = i + (i & 4);
    a[i] = _mm512_inserti64x4(_mm512_castsi256_si512(row(r)), row(r + 4), 1);
  }
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {  // a[i + j]: pairs j and j + 4 of four rows, then of the next four
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  for (int j = 0; j < 4; ++j) {
    pairs[j] = _mm512_shuffle_i64x2(a[j], a[j + 4], 0x88);
    pairs[j + 4] = _mm512_shuffle_i64x2(a[j], a[j + 4], 0xDD);
  }
}

// The same for any type, one column to a vector of float32: columns[k] holds column k of all rows.
template <bool kFull, typename T>
ALWAYS_INLINE void load_block(const T* rows, int64_t stride, int live, int depth, Vec* columns) {
  if constexpr (sizeof(T) == 4) {
    for (int i = 0; i < 16; ++i) {
      const T* row = rows + i * stride;
      columns[i] = kFull ? vec_load(row) : i < live ? vec_load_n(row, depth) : vec_zero();
    }
    vec_transpose(columns);
  } else {  // half the shuffles
    __m512i pairs[8];
    transpose_pairs<kFull>(rows, stride, live, depth, pairs);
    for (int i = 0; i < 8; ++i) widen_pairs(T(), pairs[i], columns + 2 * i);
  }
}

}  // namespace

#include "simd_products.h"

namespace {

#ifdef __AVX512BF16__
// A word goes to the upper half of its lane: a shuffle for what is otherwise a shuffle and a shift.
inline void vec_load2(const bf16* p, Vec* out) {
  const __m512i words = _mm512_loadu_si512(p);
  const __m512i low = _mm512_set_epi16(15, 0, 14, 0, 13, 0, 12, 0, 11, 0, 10, 0, 9, 0, 8, 0, 7, 0, 6, 0, 5, 0, 4, 0, 3,
                                       0, 2, 0, 1, 0, 0, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  out[0].v = _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xAAAAAAAAu, low, words));
  out[1].v = _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xAAAAAAAAu, high, words));
}
inline void vec_store2(bf16* p, Vec a, Vec b) {
  _mm512_storeu_si512(p, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b.v, a.v)));
}

template <>
struct Dot<bf16> {
  static constexpr int kStep = 32;
  using Operand = __m512bh;
  static Operand load(const bf16* p) { return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p)); }
  static Operand load_n(const bf16* p, int n) {
    return reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi16((1u << n) - 1, p));
  }
  static Vec step(Operand x, Operand w, Vec acc) { return {_mm512_dpbf16_ps(acc.v, x, w)}; }
};

template <>
struct Outer<bf16> {
  static constexpr int kPack = 2;
  static constexpr bool kDirect = true;
  struct Cell {  // a pair wherever it lies: cells of x and dy are the tensor's own rows
    bf16 low, high;
  };
  using Operand = __m512bh;
  static Operand load(const Cell* p) { return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p)); }
  static Vec step(const Cell* a, Operand b, Vec acc) {
    int pair;
    std::memcpy(&pair, a, 4);
    return {_mm512_dpbf16_ps(acc.v, reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair)), b)};
  }
  template <bool kFull>
  ALWAYS_INLINE static void load_block(const bf16* rows, int64_t stride, int live, int depth, Operand* cells) {
    transpose_pairs<kFull>(rows, stride, live, depth, reinterpret_cast<__m512i*>(cells));
  }
  // Cells of two rows (the second may be null), n <= 16 columns, zero beyond.
  static void pack_rows(const bf16* const* rows, int n, Cell* out) {
    interleave(bits(rows, 0, n), bits(rows, 1, n), out);
  }
  static void pack_rows(const float* const* rows, int n, Cell* out) {
    interleave(round_n(rows[0], n), rows[1] ? round_n(rows[1], n) : _mm256_setzero_si256(), out);
  }
  static void pack_sums(const float* source, int64_t n, Cell* out) {
    for (int64_t i = 0; i < n; i += 16, out += 8) {
      const int some = n - i < 16 ? static_cast<int>(n - i) : 16;
      _mm256_mask_storeu_epi32(out, static_cast<__mmask8>((1u << (some + 1) / 2) - 1), round_n(source + i, some));
    }
  }

 private:
  static __m256i bits(const bf16* const* rows, int i, int n) {
    return rows[i] ? load_16_n(rows[i], n) : _mm256_setzero_si256();
  }
  static __m256i round_n(const float* p, int n) {
    return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(vec_load_n(p, n).v));
  }
  static void interleave(__m256i low, __m256i high, Cell* out) {
    _mm512_storeu_si512(
        out, _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16)));
  }
};
#endif

}  // namespace
