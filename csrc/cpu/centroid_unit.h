// Centroids as units of work: sums over the members of clusters in float64, for some columns at a time.
#pragma once
#include "points_unit.h"

namespace {

using lorakern::UpdateUnit;

inline int64_t update_scratch(const UpdateUnit& u) { return u.problem->k * (u.end - u.begin + kWidth); }  // doubles

// Centroids, and the inertia of these columns, of which the points are read once more while they are in a cache.
inline void update(const UpdateUnit& u, double* sums) {
  const lorakern::UpdateProblem& p = *u.problem;
  const Rows& x = p.points.parts[u.part];
  const float* scales = p.points.scales ? p.points.scales + u.part * x.rows : nullptr;
  const int64_t width = u.end - u.begin + kWidth;
  std::fill(sums, sums + p.k * width, 0.0);
  constexpr int kHalf = kWidth / 2;
  for_each_vector(x, u.begin, u.end, [&](int64_t row, int64_t k, int, Vec values) ALWAYS_INLINE_LAMBDA {
    double lanes[kWidth], *to = sums + p.members[row] * width + k - u.begin;
    const Wide factor = wide_set(p.weights[row] * (scales ? scales[row] : 1.0f));
    vec_widen(lanes, values);
    for (int h = 0; h < kWidth; h += kHalf)
      wide_store(to + h, wide_fma(factor, wide_load(lanes + h), wide_load(to + h)));
  });
  for (int64_t c = 0; c < p.k; ++c)
    for (int64_t k = u.begin; k < u.end; ++k) {
      double& mean = sums[c * width + k - u.begin];
      mean = p.counts[c] > 0 ? mean / p.counts[c] : 0.0;
      p.centroids[c * p.points.columns + u.first + k] = static_cast<float>(mean);
    }
  if (!p.labels) return;
  Wide inertia[2] = {wide_zero(), wide_zero()};
  for_each_vector(x, u.begin, u.end, [&](int64_t row, int64_t k, int some, Vec values) ALWAYS_INLINE_LAMBDA {
    double lanes[kWidth];
    const double* mean = sums + p.labels[row] * width + k - u.begin;
    const Wide scale = wide_set(scales ? scales[row] : 1.0f), minus = wide_set(-1), weight = wide_set(p.weights[row]);
    vec_widen(lanes, values);
    if (some < kWidth) std::fill(lanes + some, lanes + kWidth, 0.0);
    for (int h = 0; h < 2; ++h) {
      const Wide scaled = wide_fma(scale, wide_load(lanes + h * kHalf), wide_zero());
      const Wide difference = wide_fma(minus, wide_load(mean + h * kHalf), scaled);
      inertia[h] = wide_fma(wide_fma(difference, difference, wide_zero()), weight, inertia[h]);
    }
  });
  double lanes[kHalf];
  wide_store(lanes, wide_add(inertia[0], inertia[1]));
  *u.inertia = 0;
  for (double lane : lanes) *u.inertia += lane;
}

}  // namespace
