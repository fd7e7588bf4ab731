// One step of a dot product: kStep elements of x and of w into the accumulator. Included at the end of a simd_*.h,
// which may specialise it for a type that the CPU multiplies as it is.
#pragma once

namespace {

template <typename T>
struct Dot {
  static constexpr int kStep = kWidth;
  using Operand = Vec;
  static Operand load(const T* p) { return vec_load(p); }
  static Operand load_n(const T* p, int n) { return vec_load_n(p, n); }
  static Vec step(Operand x, Operand w, Vec acc) { return vec_fma(x, w, acc); }
};

}  // namespace
