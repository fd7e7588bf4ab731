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
  for_each_vector(x, u.begin, u.end, [&](int64_t row, int64_t k, int, Vec values) ALWAYS_INLINE_LAMBDA {
    double lanes[kWidth], *to = sums + p.members[row] * width + k - u.begin;
    const double factor = p.weights[row] * (scales ? scales[row] : 1.0f);
    vec_widen(lanes, values);
    for (int l = 0; l < kWidth; ++l) to[l] += factor * lanes[l];
  });
  for (int64_t c = 0; c < p.k; ++c)
    for (int64_t k = u.begin; k < u.end; ++k) {
      double& mean = sums[c * width + k - u.begin];
      mean = p.counts[c] > 0 ? mean / p.counts[c] : 0.0;
      p.centroids[c * p.points.columns + u.first + k] = static_cast<float>(mean);
    }
  if (!p.labels) return;
  double inertia[kWidth] = {};
  for_each_vector(x, u.begin, u.end, [&](int64_t row, int64_t k, int some, Vec values) ALWAYS_INLINE_LAMBDA {
    double lanes[kWidth];
    const double *mean = sums + p.labels[row] * width + k - u.begin, scale = scales ? scales[row] : 1.0f;
    vec_widen(lanes, values);
    for (int l = 0; l < kWidth; ++l) {
      const double difference = l < some ? scale * lanes[l] - mean[l] : 0.0;
      inertia[l] += p.weights[row] * difference * difference;
    }
  });
  *u.inertia = 0;
  for (double lane : inertia) *u.inertia += lane;
}

}  // namespace
