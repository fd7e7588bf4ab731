// What the lanes of a warp compute together, and the conversions of numbers.
#include <cmath>
#include <cstring>

#include "ptx.cuh"
#include "races.h"

namespace emulator {

// ---- Numbers

// 11 bits of significand above 2^-14, a fixed step of 2^-24 below: float32 arithmetic does the rounding.
uint16_t half_bits(float v) {
  const auto bits = lorakern_bits<uint32_t>(v);
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return 0x7fff;
  if (magnitude >= 0x477ff000) return sign | 0x7c00;  // 65520, halfway beyond the largest, and more
  if (magnitude < 0x38800000) {                       // adding 2^-1 leaves multiples of 2^-24
    return sign | static_cast<uint16_t>(lorakern_bits<uint32_t>(lorakern_bits<float>(magnitude) + 0.5f) - 0x3f000000);
  }
  const uint32_t rebiased = magnitude - ((127u - 15u) << 23);
  return sign | static_cast<uint16_t>((rebiased + 0xfff + (rebiased >> 13 & 1)) >> 13);
}

float half_value(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, magnitude = bits & 0x7fff;
  if (magnitude >= 0x7c00) return lorakern_bits<float>(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  if (magnitude >= 0x400) return lorakern_bits<float>(sign | ((magnitude << 13) + ((127u - 15u) << 23)));
  const float small = static_cast<float>(magnitude) * 0x1p-24f;
  return sign ? -small : small;
}

// cvt.rna.tf32.f32: to nearest, halves away from zero.
uint32_t round_tf32(float value) {
  const auto bits = lorakern_bits<uint32_t>(value);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return 0x7fffffff;
  return magnitude == 0x7f800000 ? bits : (bits + 0x1000) & ~0x1fffu;
}

// ---- Shuffles and votes

void combine_shuffles(void* const (&lanes)[kLanes], uint32_t mask) {
  uint64_t values[kLanes];
  memset(values, 0xff, sizeof values);  // undefined: of lanes that take no part
  for (int i = 0; i < kLanes; ++i) {
    if (mask >> i & 1) values[i] = static_cast<const Shuffle*>(lanes[i])->value;
  }
  for (int i = 0; i < kLanes; ++i) {
    if (mask >> i & 1) static_cast<Shuffle*>(lanes[i])->value = values[static_cast<Shuffle*>(lanes[i])->source];
  }
}

uint32_t ballot(const char* what, Site site, uint32_t mask, bool predicate) {
  uint32_t result = predicate;
  meet_warp(what, site, mask, false, &result, [](void* const(&lanes)[kLanes], uint32_t mask) {
    uint32_t votes = 0;
    for (int i = 0; i < kLanes; ++i) {
      if (mask >> i & 1) votes |= *static_cast<const uint32_t*>(lanes[i]) << i;
    }
    for (int i = 0; i < kLanes; ++i) {
      if (mask >> i & 1) *static_cast<uint32_t*>(lanes[i]) = votes;
    }
  });
  return result;
}

// ---- ldmatrix

struct MatrixLoad {
  const void* row;
  uint32_t* out;
};

static void combine_loads(void* const (&lanes)[kLanes], uint32_t) {
  uint16_t rows[kLanes][8];
  for (int i = 0; i < kLanes; ++i) memcpy(rows[i], static_cast<const MatrixLoad*>(lanes[i])->row, sizeof rows[i]);
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const uint16_t (*matrix)[8] = rows + 8 * i;
      const uint32_t low = matrix[g][2 * t], high = matrix[g][2 * t + 1];
      static_cast<const MatrixLoad*>(lanes[lane])->out[i] = low | high << 16;
    }
  }
}

void load_matrices(Site site, uint32_t (&out)[4], const void* row) {
  const char* what = "load_matrices";
  check_shared(what, site, row, 16);
  races::reads(row, 16);
  MatrixLoad load = {row, out};
  meet_warp(what, site, 0xffffffff, true, &load, combine_loads);
}

// ---- mma

struct Product {
  float* c;
  const uint32_t* a;
  uint32_t b[2];
};

// Products and sums in float64, one rounding to float32 at the end. The hardware's own sums of an instruction are
// shorter than float64 and cut off: this is not modelled, only that an instruction's result depends on nothing else.
template <int kDepth, typename Value>
static void multiply_all(void* const (&lanes)[kLanes], Value value) {
  constexpr int kPerRegister = kDepth / 8;  // elements in 32 bits
  double a[16][kDepth], b[kDepth][8], c[16][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, t = lane % 4;
    const Product& p = *static_cast<const Product*>(lanes[lane]);
    for (int i = 0; i < 4; ++i) c[g + i / 2 * 8][2 * t + i % 2] = p.c[i];
    for (int e = 0; e < kPerRegister; ++e) {
      const int k = kPerRegister * t + e;
      for (int i = 0; i < 4; ++i) a[g + i % 2 * 8][k + i / 2 * kDepth / 2] = value(p.a[i], e);
      for (int i = 0; i < 2; ++i) b[k + i * kDepth / 2][g] = value(p.b[i], e);
    }
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < kDepth; ++k) {
      for (int column = 0; column < 8; ++column) c[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, t = lane % 4;
    float* out = static_cast<const Product*>(lanes[lane])->c;
    for (int i = 0; i < 4; ++i) out[i] = static_cast<float>(c[g + i / 2 * 8][2 * t + i % 2]);
  }
}

static uint16_t half_of(uint32_t pair, int which) { return static_cast<uint16_t>(pair >> 16 * which); }

void multiply(Site site, Factor factor, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Product product = {c, a, {b0, b1}};
  switch (factor) {
    case Factor::kHalf:
      return meet_warp("multiply<half>", site, 0xffffffff, true, &product, [](void* const(&lanes)[kLanes], uint32_t) {
        multiply_all<16>(lanes, [](uint32_t pair, int which) { return half_value(half_of(pair, which)); });
      });
    case Factor::kBFloat16:
      return meet_warp("multiply<bf16>", site, 0xffffffff, true, &product, [](void* const(&lanes)[kLanes], uint32_t) {
        multiply_all<16>(lanes, [](uint32_t pair, int which) { return bfloat16_value(half_of(pair, which)); });
      });
    case Factor::kTf32:  // the bits that tf32 lacks are not looked at
      return meet_warp("multiply_tf32", site, 0xffffffff, true, &product, [](void* const(&lanes)[kLanes], uint32_t) {
        multiply_all<8>(lanes, [](uint32_t bits, int) { return lorakern_bits<float>(bits & ~0x1fffu); });
      });
  }
}

}  // namespace emulator
