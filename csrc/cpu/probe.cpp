// The code is chosen by cpuid like that of the kernels, but by function attributes: there is one file, not one per ISA.
#include "probe.h"

#include <cstring>
#include <vector>

#include "threads.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace lorakern::cpu {
namespace {

constexpr int64_t kChunk = 256 << 10;  // bytes that a thread takes at once
constexpr int kStreams = 4;            // read side by side: one stream does not keep enough lines in flight
constexpr int kAccumulators = 16;      // more than the latency of an FMA times those that start in a cycle

using Read = uint64_t (*)(const char*, int64_t);
using Fma = float (*)(int64_t);

// A chunk is kStreams stretches of the same length; the rest of the buffer comes as chunks of one stretch.
uint64_t read_generic(const char* data, int64_t bytes) {
  uint64_t sum = 0, word;
  for (int64_t i = 0; i + 8 <= bytes; i += 8) {
    std::memcpy(&word, data + i, 8);
    sum ^= word;
  }
  for (int64_t i = bytes / 8 * 8; i < bytes; ++i) sum ^= static_cast<unsigned char>(data[i]);
  return sum;
}

float fma_generic(int64_t rounds) {
  float a[kAccumulators];
  for (int i = 0; i < kAccumulators; ++i) a[i] = static_cast<float>(i);
  for (int64_t n = 0; n < rounds; ++n)
    for (int i = 0; i < kAccumulators; ++i) a[i] = a[i] * 0.999f + 0.5f;
  float sum = 0;
  for (float value : a) sum += value;
  return sum;
}

#if defined(__x86_64__)

__attribute__((target("avx2"))) uint64_t read_avx2(const char* data, int64_t bytes) {
  const int64_t stretch = bytes / kStreams / 64 * 64;
  __m256i sums[kStreams * 2];
  for (auto& sum : sums) sum = _mm256_setzero_si256();
  for (int64_t i = 0; i < stretch; i += 64)
#pragma GCC unroll 8
    for (int s = 0; s < kStreams * 2; ++s)
      sums[s] = _mm256_xor_si256(
          sums[s], _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data + s / 2 * stretch + i + s % 2 * 32)));
  for (int s = 1; s < kStreams * 2; ++s) sums[0] = _mm256_xor_si256(sums[0], sums[s]);
  uint64_t words[4];
  std::memcpy(words, sums, sizeof words);
  return words[0] ^ words[1] ^ words[2] ^ words[3] ^
         read_generic(data + kStreams * stretch, bytes - kStreams * stretch);
}

__attribute__((target("avx512f"))) uint64_t read_avx512(const char* data, int64_t bytes) {
  const int64_t stretch = bytes / kStreams / 64 * 64;
  __m512i sums[kStreams];
  for (auto& sum : sums) sum = _mm512_setzero_si512();
  for (int64_t i = 0; i < stretch; i += 64)
#pragma GCC unroll 8
    for (int s = 0; s < kStreams; ++s) sums[s] = _mm512_xor_si512(sums[s], _mm512_loadu_si512(data + s * stretch + i));
  for (int s = 1; s < kStreams; ++s) sums[0] = _mm512_xor_si512(sums[0], sums[s]);
  uint64_t words[8], sum = 0;
  std::memcpy(words, sums, sizeof words);
  for (uint64_t word : words) sum ^= word;
  return sum ^ read_generic(data + kStreams * stretch, bytes - kStreams * stretch);
}

__attribute__((target("avx2,fma"))) float fma_avx2(int64_t rounds) {
  const __m256 b = _mm256_set1_ps(0.999f), c = _mm256_set1_ps(0.5f);
  // Sixteen registers are all there are: two of them hold the factors.
  __m256 a[kAccumulators - 4];
  for (int i = 0; i < kAccumulators - 4; ++i) a[i] = _mm256_set1_ps(static_cast<float>(i));
  for (int64_t n = 0; n < rounds; ++n)
#pragma GCC unroll 16
    for (int i = 0; i < kAccumulators - 4; ++i) a[i] = _mm256_fmadd_ps(a[i], b, c);
  for (int i = 1; i < kAccumulators - 4; ++i) a[0] = _mm256_add_ps(a[0], a[i]);
  float lanes[8];
  std::memcpy(lanes, a, sizeof lanes);
  return lanes[0] + lanes[7];
}

__attribute__((target("avx512f"))) float fma_avx512(int64_t rounds) {
  const __m512 b = _mm512_set1_ps(0.999f), c = _mm512_set1_ps(0.5f);
  __m512 a[kAccumulators];
  for (int i = 0; i < kAccumulators; ++i) a[i] = _mm512_set1_ps(static_cast<float>(i));
  for (int64_t n = 0; n < rounds; ++n)
#pragma GCC unroll 16
    for (int i = 0; i < kAccumulators; ++i) a[i] = _mm512_fmadd_ps(a[i], b, c);
  for (int i = 1; i < kAccumulators; ++i) a[0] = _mm512_add_ps(a[0], a[i]);
  float lanes[16];
  std::memcpy(lanes, a, sizeof lanes);
  return lanes[0] + lanes[15];
}

__attribute__((target("avx512f,avx512bf16"))) float fma_avx512bf16(int64_t rounds) {
  const __m512 one = _mm512_set1_ps(1.0f);
  const __m512bh b = _mm512_cvtne2ps_pbh(one, one);
  __m512 a[kAccumulators];
  for (int i = 0; i < kAccumulators; ++i) a[i] = _mm512_set1_ps(static_cast<float>(i));
  for (int64_t n = 0; n < rounds; ++n)
#pragma GCC unroll 16
    for (int i = 0; i < kAccumulators; ++i) a[i] = _mm512_dpbf16_ps(a[i], b, b);
  for (int i = 1; i < kAccumulators; ++i) a[0] = _mm512_add_ps(a[0], a[i]);
  float lanes[16];
  std::memcpy(lanes, a, sizeof lanes);
  return lanes[0] + lanes[15];
}

#endif

struct Best {
  Read read = read_generic;
  Fma fma = fma_generic, fma_bf16 = nullptr;
  const char *name = "generic multiply and add", *name_bf16 = nullptr;
  double operations = 2 * kAccumulators, operations_bf16 = 0;  // of one round
};

const Best& best() {
  static const Best found = [] {
    Best b;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
      b.read = read_avx2;
      b.fma = fma_avx2, b.name = "avx2 fma", b.operations = 2.0 * 8 * (kAccumulators - 4);
    }
    if (__builtin_cpu_supports("avx512f")) {
      b.read = read_avx512;
      b.fma = fma_avx512, b.name = "avx512 fma", b.operations = 2.0 * 16 * kAccumulators;
    }
    if (__builtin_cpu_supports("avx512bf16"))
      b.fma_bf16 = fma_avx512bf16, b.name_bf16 = "avx512 dpbf16", b.operations_bf16 = 4.0 * 16 * kAccumulators;
#endif
    return b;
  }();
  return found;
}

}  // namespace

uint64_t read_buffer(const void* data, int64_t bytes, int threads) {
  const char* begin = static_cast<const char*>(data);
  const int64_t chunks = (bytes + kChunk - 1) / kChunk;
  std::atomic<uint64_t> sum{0};
  parallel_for(threads, chunks, [&](int64_t i) {
    const int64_t first = i * kChunk, length = first + kChunk < bytes ? kChunk : bytes - first;
    sum.fetch_xor(best().read(begin + first, length), std::memory_order_relaxed);
  });
  return sum;
}

FmaLoop fma_loop(bool bf16, int64_t rounds, int threads) {
  const Best& b = best();
  bf16 = bf16 && b.fma_bf16;
  const Fma loop = bf16 ? b.fma_bf16 : b.fma;
  std::vector<float> sums(threads > 0 ? threads : 1);
  const auto count = static_cast<int64_t>(sums.size());
  parallel_for(threads, count, [&](int64_t i) { sums[i] = loop(rounds); });
  float checksum = 0;
  for (float sum : sums) checksum += sum;
  const double operations = (bf16 ? b.operations_bf16 : b.operations) * static_cast<double>(rounds) * count;
  return {bf16 ? b.name_bf16 : b.name, operations, checksum};
}

}  // namespace lorakern::cpu
