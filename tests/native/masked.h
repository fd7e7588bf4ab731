// Included before every file of a sanitized build. GCC instruments plain loads and stores but not masked ones: here
// they become plain ones, element by element. tests/sanitize.py checks that none is missing.
#pragma once
#include <cstdint>

#ifdef __AVX512BW__
#include <immintrin.h>

namespace {

template <typename T, typename V>
inline V plain_load(uint64_t mask, const void* from, V loaded) {
  T* out = reinterpret_cast<T*>(&loaded);
  for (unsigned i = 0; i < sizeof(V) / sizeof(T); ++i)
    if (mask >> i & 1) out[i] = static_cast<const T*>(from)[i];
  return loaded;
}

template <typename T, typename V>
inline void plain_store(void* to, uint64_t mask, V value) {
  const T* in = reinterpret_cast<const T*>(&value);
  for (unsigned i = 0; i < sizeof(V) / sizeof(T); ++i)
    if (mask >> i & 1) static_cast<T*>(to)[i] = in[i];
}

}  // namespace

#define _mm512_maskz_loadu_ps(mask, from) plain_load<float>(mask, from, _mm512_setzero_ps())
#define _mm512_maskz_loadu_epi16(mask, from) plain_load<uint16_t>(mask, from, _mm512_setzero_si512())
#define _mm256_maskz_loadu_epi16(mask, from) plain_load<uint16_t>(mask, from, _mm256_setzero_si256())
#define _mm512_mask_storeu_ps(to, mask, value) plain_store<float>(to, mask, value)
#define _mm256_mask_storeu_epi16(to, mask, value) plain_store<uint16_t>(to, mask, value)
#define _mm256_mask_storeu_epi32(to, mask, value) plain_store<uint32_t>(to, mask, value)
#endif
