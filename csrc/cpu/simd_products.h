// The two ways to multiply, for one type of operand. Included at the end of a simd_*.h, which may specialise them for a
// type that the CPU multiplies as it is.
#pragma once
#include <cstring>

namespace {

// Two neighbouring vectors at once, for types that have something better than one after the other.
template <typename T>
inline void vec_load2(const T* p, Vec* out) {
  out[0] = vec_load(p);
  out[1] = vec_load(p + kWidth);
}
template <typename T>
inline void vec_store2(T* p, Vec a, Vec b) {
  vec_store(p, a);
  vec_store(p + kWidth, b);
}

// One step of a dot product: kStep elements of x and of w into the accumulator.
template <typename T>
struct Dot {
  static constexpr int kStep = kWidth;
  using Operand = Vec;
  static Operand load(const T* p) { return vec_load(p); }
  static Operand load_n(const T* p, int n) { return vec_load_n(p, n); }
  static Vec step(Operand x, Operand w, Vec acc) { return vec_fma(x, w, acc); }
};

// One step of an outer product: a number on the left times kWidth numbers on the right, for kPack terms of the sum at
// once. A cell holds kPack numbers that are neighbours along the sum.
template <typename T>
struct Outer {
  static constexpr int kPack = 1;
  static constexpr bool kDirect = sizeof(T) == 4;  // a row of T is a row of cells as it lies in memory
  using Cell = float;
  using Operand = Vec;
  static Operand load(const Cell* p) { return vec_load(p); }
  static Vec step(const Cell* a, Operand b, Vec acc) { return vec_fma(vec_set(*a), b, acc); }
  // cells[k]: the k-th cell of kWidth rows, of which `live` count and `depth` <= kWidth elements are read.
  template <bool kFull>
  ALWAYS_INLINE static void load_block(const T* rows, int64_t stride, int live, int depth, Operand* cells) {
    ::load_block<kFull>(rows, stride, live, depth, cells);
  }
  // Cells of kPack rows for n <= kWidth columns, zero beyond.
  template <typename S>
  static void pack_rows(const S* const* rows, int n, Cell* out) {
    vec_store(out, n == kWidth ? vec_load(rows[0]) : vec_load_n(rows[0], n));
  }
  // Cells of n numbers that are neighbours along the sum.
  static void pack_sums(const float* source, int64_t n, Cell* out) { std::memcpy(out, source, n * sizeof(float)); }
};

}  // namespace
