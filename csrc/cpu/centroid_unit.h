// Centroids as units of work: sums over the members of clusters in float64, for some columns at a time.
#pragma once
#include "points_unit.h"

namespace {

using lorakern::UpdateUnit;

constexpr int64_t kCentroidDoubles = 1 << 12;  // of sums at a time: most of L1

// So many columns at a time, whole vectors.
inline int64_t centroid_columns(int64_t k) {
  return std::clamp<int64_t>(kCentroidDoubles / k / kWidth, 4, 32) * kWidth;
}

inline int64_t update_scratch(const UpdateUnit& u) {  // doubles
  return u.problem->k * (centroid_columns(u.problem->k) + kWidth);
}

inline double sum_of_lanes(Wide a) {
  double lanes[kWidth / 2], total = 0;
  wide_store(lanes, a);
  for (double lane : lanes) total += lane;
  return total;
}

// The sum of a[i]^2.
inline double squares_of(const double* a, int64_t count) {
  constexpr int kHalf = kWidth / 2;
  Wide sum = wide_zero();
  int64_t i = 0;
  for (; i + kHalf <= count; i += kHalf) sum = wide_fma(wide_load(a + i), wide_load(a + i), sum);
  double total = sum_of_lanes(sum);
  for (; i < count; ++i) total += a[i] * a[i];
  return total;
}

// sums[c] = sum w_i x_i over the members i of c, for columns begin .. end; returns sum w_i ||x_i||^2.
inline double add_members(const UpdateUnit& u, int64_t begin, int64_t end, int64_t width, double* sums) {
  const lorakern::UpdateProblem& p = *u.problem;
  const Rows& x = p.points.parts[u.part];
  const float* scales = p.points.scales ? p.points.scales + u.part * x.rows : nullptr;
  std::fill(sums, sums + p.k * width, 0.0);
  Wide squares[2] = {wide_zero(), wide_zero()};
  for_each_vector(x, begin, end, [&](int64_t row, int64_t k, int, Vec values) ALWAYS_INLINE_LAMBDA {
    double* to = sums + p.members[row] * width + k - begin;
    const double scale = scales ? scales[row] : 1.0f;
    const Wide halves[2] = {wide_low(values), wide_high(values)}, factor = wide_set(p.weights[row] * scale),
               again = wide_set(scale);
    for (int h = 0; h < 2; ++h, to += kWidth / 2) {
      const Wide weighted = wide_fma(factor, halves[h], wide_zero());
      wide_store(to, wide_add(wide_load(to), weighted));
      squares[h] = wide_fma(wide_fma(again, halves[h], wide_zero()), weighted, squares[h]);
    }
  });
  return sum_of_lanes(wide_add(squares[0], squares[1]));
}

// sum w_i ||x_i - means[label of i]||^2 over the columns, from the differences themselves.
inline double sum_of_differences(const UpdateUnit& u, int64_t begin, int64_t end, int64_t width, const double* means) {
  const lorakern::UpdateProblem& p = *u.problem;
  const Rows& x = p.points.parts[u.part];
  const float* scales = p.points.scales ? p.points.scales + u.part * x.rows : nullptr;
  Wide total = wide_zero();
  for_each_vector(x, begin, end, [&](int64_t row, int64_t k, int, Vec values) ALWAYS_INLINE_LAMBDA {
    const double* mean = means + p.labels[row] * width + k - begin;  // zero where there are no columns
    const Wide halves[2] = {wide_low(values), wide_high(values)}, scale = wide_set(scales ? scales[row] : 1.0f),
               weight = wide_set(p.weights[row]);
    for (int h = 0; h < 2; ++h) {
      const Wide minus = wide_fma(wide_set(-1), wide_load(mean + h * kWidth / 2), wide_zero());
      const Wide difference = wide_fma(scale, halves[h], minus);
      total = wide_fma(wide_fma(difference, difference, wide_zero()), weight, total);
    }
  });
  return sum_of_lanes(total);
}

// Centroids, and the inertia of these columns. Where points are members of the clusters of their labels it is that of
// the points less that of the centroids, which float64 tells apart; else the points are read once more.
inline void update(const UpdateUnit& u, double* sums) {
  const lorakern::UpdateProblem& p = *u.problem;
  const int64_t most = centroid_columns(p.k);
  *u.inertia = 0;
  for (int64_t begin = u.begin; begin < u.end; begin += most) {
    const int64_t end = std::min(begin + most, u.end), columns = end - begin, width = columns + kWidth;
    const double squares = add_members(u, begin, end, width, sums);
    double of_centroids = 0;
    for (int64_t c = 0; c < p.k; ++c) {
      double* __restrict mean = sums + c * width;
      float* __restrict out = p.centroids + c * p.points.columns + u.first + begin;
      const double inverse = p.counts[c] > 0 ? 1 / p.counts[c] : 0.0;
      for (int64_t k = 0; k < columns; ++k) out[k] = static_cast<float>(mean[k] *= inverse);
      of_centroids += p.counts[c] * squares_of(mean, columns);
    }
    if (p.labels) *u.inertia += u.settled ? squares - of_centroids : sum_of_differences(u, begin, end, width, sums);
  }
}

}  // namespace
