// k-means of points of which only the inner products G are known, for one run at a time. With S_ic the sum of w_j G_ij
// over the members j of cluster c, W_c that of w_j, and q_c the sum of w_i S_ic over the members i, divided by W_c^2,
//   ||x_i - centroid c||^2 = G_ii - 2 S_ic / W_c + q_c.
// All sums are float64, in an order that depends on the problem alone; loops over points are for the compiler to
// vectorise.
#pragma once
#include <algorithm>
#include <limits>

#include "variant.h"

namespace {

using lorakern::Cloud;
using lorakern::LloydUnit;
using lorakern::SeedUnit;

constexpr int kLanes = 8;

inline int64_t padded(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

// The first index up to which the values add up to more than `share` of their total; `upto` gets the sums.
struct Draw {
  const double* upto;
  int64_t count;

  int64_t operator()(double share) const {
    const double total = upto[count - 1], wanted = share * total;
    int64_t first = 0, last = count - 1;
    while (first < last) {
      const int64_t middle = (first + last) / 2;
      // Where the product is rounded up to the total, the index is that of the last value which is not 0.
      if (upto[middle] > wanted || upto[middle] == total)
        last = middle;
      else
        first = middle + 1;
    }
    return first;
  }
};

inline Draw draw_from(const double* values, int64_t count, double* upto) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) upto[i] = sum += values[i];
  return {upto, count};
}

inline double sum_of(const double* values, int64_t count) {
  double lanes[kLanes] = {}, total = 0;
  for (int64_t i = 0; i < count; i += kLanes)
    for (int l = 0; l < kLanes; ++l) lanes[l] += values[i + l];
  for (double lane : lanes) total += lane;
  return total;
}

inline int64_t seed_scratch(const Cloud& cloud) { return 5 * padded(cloud.count); }  // doubles

// Greedy k-means++ (Arthur and Vassilvitskii 2007): of several points drawn by their squared distance to the nearest
// seed, each weighted, the one that leaves the least sum of these becomes the next.
inline void seed(const SeedUnit& u, double* scratch) {
  const lorakern::SeedProblem& p = *u.problem;
  const int64_t n = p.cloud.count, width = padded(n);
  const double* uniform = p.uniforms + u.run * p.stride;
  int64_t* seeds = p.seeds + u.run * p.cloud.k;
  double *nearest = scratch, *weighted = nearest + width, *diagonal = weighted + width, *after = diagonal + width,
         *upto = after + width;
  std::fill(scratch, scratch + seed_scratch(p.cloud), 0.0);
  for (int64_t i = 0; i < n; ++i) {
    diagonal[i] = p.cloud.gram[i * n + i];
    nearest[i] = std::numeric_limits<double>::infinity();
  }
  // Squared distances to the nearest seed if point c were one, and their weighted sum.
  const auto with = [&](int64_t c) {
    const float* row = p.cloud.gram + c * n;
    const double own = diagonal[c];
    for (int64_t i = 0; i < n; ++i) {
      const double distance = std::max(0.0, diagonal[i] + own - 2.0 * row[i]);
      after[i] = std::min(nearest[i], distance);
      weighted[i] = p.cloud.weights[i] * after[i];
    }
    return sum_of(weighted, width);
  };
  seeds[0] = draw_from(p.cloud.weights, n, upto)(*uniform++);
  with(seeds[0]);
  for (int64_t c = 1; c < p.cloud.k; ++c) {
    std::copy(after, after + n, nearest);
    const Draw draw = draw_from(weighted, n, upto);
    double least = std::numeric_limits<double>::infinity();
    for (int64_t t = 0; t < p.trials; ++t) {
      const int64_t candidate = draw(*uniform++);
      const double sum = with(candidate);
      if (sum < least) least = sum, seeds[c] = candidate;
    }
    with(seeds[c]);
  }
}

// The state of one run, in its scratch.
struct Lloyd {
  const Cloud& cloud;
  int64_t n, k, width;
  double *sums, *weight, *square, *cross, *old_weight, *old_square;  // sums: (k, width), S transposed
  double *best, *sqdist, *diagonal;
  int64_t *label, *old_label, *member, *old_member, *size;

  // S_ic for all i changes by `weight` times the row of point j.
  void add_point(int64_t c, int64_t j, double by) {
    double* to = sums + c * width;
    const float* row = cloud.gram + j * n;
    for (int64_t i = 0; i < n; ++i) to[i] += by * row[i];
  }

  void assign() {
    std::fill(best, best + n, std::numeric_limits<double>::infinity());
    for (int64_t c = 0; c < k; ++c) {
      const double *from = sums + c * width, offset = square[c], factor = -2.0 / weight[c];
      for (int64_t i = 0; i < n; ++i) {
        const double score = offset + factor * from[i];
        label[i] = score < best[i] ? c : label[i];
        best[i] = score < best[i] ? score : best[i];
      }
    }
    for (int64_t i = 0; i < n; ++i) sqdist[i] = std::max(0.0, best[i] + diagonal[i]);
  }

  // Members are those of the labels; then every cluster without a member takes the farthest point that can be spared.
  void choose_members() {
    std::fill(size, size + k, int64_t{0});
    for (int64_t i = 0; i < n; ++i) {
      member[i] = label[i];
      size[label[i]] += cloud.weights[i] > 0;
    }
    for (int64_t c = 0; c < k; ++c) {
      if (size[c] > 0) continue;
      int64_t farthest = -1;
      for (int64_t i = 0; i < n; ++i)
        if (cloud.weights[i] > 0 && size[member[i]] > 1 && (farthest < 0 || sqdist[i] > sqdist[farthest])) farthest = i;
      --size[member[farthest]];
      member[farthest] = c;
      size[c] = 1;
      sqdist[farthest] = 0;
    }
  }

  // S, W and q of the members; from what they were, unless most points move.
  void update(bool fresh) {
    int64_t moved = 0;
    for (int64_t i = 0; i < n; ++i) moved += member[i] != old_member[i];
    fresh = fresh || 2 * moved > n;
    if (fresh) std::fill(sums, sums + k * width, 0.0);
    for (int64_t i = 0; i < n; ++i) {
      if (cloud.weights[i] == 0 || (!fresh && member[i] == old_member[i])) continue;
      if (!fresh) add_point(old_member[i], i, -cloud.weights[i]);
      add_point(member[i], i, cloud.weights[i]);
    }
    std::fill(weight, weight + k, 0.0);
    std::fill(square, square + k, 0.0);
    for (int64_t i = 0; i < n; ++i) {
      weight[member[i]] += cloud.weights[i];
      square[member[i]] += cloud.weights[i] * sums[member[i] * width + i];
    }
    for (int64_t c = 0; c < k; ++c) square[c] /= weight[c] * weight[c];
    std::copy(member, member + n, old_member);
  }

  // Inner products of the old centroids, still in `sums`, with the sums that the members will make.
  void cross_products() {
    std::fill(cross, cross + k, 0.0);
    for (int64_t i = 0; i < n; ++i) cross[member[i]] += cloud.weights[i] * sums[member[i] * width + i];
    std::copy(weight, weight + k, old_weight);
    std::copy(square, square + k, old_square);
  }

  // Sum over clusters of ||centroid - old centroid||^2.
  double shift() const {
    double total = 0;
    for (int64_t c = 0; c < k; ++c)
      total += std::max(0.0, square[c] + old_square[c] - 2 * cross[c] / (weight[c] * old_weight[c]));
    return total;
  }

  // The same where the old centroids are not of this cloud: what their distances exceed those to the means by.
  double shift_from(const double* first_sqdist) const {
    if (!std::equal(member, member + n, label)) return std::numeric_limits<double>::infinity();
    double total = 0;
    for (int64_t i = 0; i < n; ++i) total += cloud.weights[i] / weight[label[i]] * (first_sqdist[i] - diagonal[i]);
    for (int64_t c = 0; c < k; ++c) total += square[c];
    return std::max(0.0, total);
  }

  double inertia() const {
    double total = 0;
    for (int64_t i = 0; i < n; ++i) total += cloud.weights[i] * sqdist[i];
    return total;
  }
};

// In doubles.
inline int64_t lloyd_scratch(const Cloud& cloud) {
  const int64_t width = padded(cloud.count);
  return cloud.k * (width + 6) + 7 * width;
}

inline Lloyd lloyd_state(const Cloud& cloud, double* scratch) {
  const int64_t width = padded(cloud.count), k = cloud.k;
  double *weight = scratch + k * width, *best = weight + 6 * k;
  auto* label = reinterpret_cast<int64_t*>(best + 3 * width);
  return {cloud,
          cloud.count,
          k,
          width,
          scratch,
          weight,
          weight + k,
          weight + 2 * k,
          weight + 3 * k,
          weight + 4 * k,
          best,
          best + width,
          best + 2 * width,
          label,
          label + width,
          label + 2 * width,
          label + 3 * width,
          reinterpret_cast<int64_t*>(weight + 5 * k)};
}

inline void lloyd(const LloydUnit& u, double* scratch) {
  const lorakern::LloydProblem& p = *u.problem;
  Lloyd s = lloyd_state(p.cloud, scratch);
  std::fill(s.old_label, s.old_label + s.n, int64_t{-1});
  std::fill(s.old_member, s.old_member + s.n, int64_t{-1});
  std::fill(s.sums, s.sums + s.k * s.width, 0.0);
  for (int64_t i = 0; i < s.n; ++i) s.diagonal[i] = p.cloud.gram[i * s.n + i];
  for (int64_t c = 0; p.seeds && c < s.k; ++c) {
    const int64_t point = p.seeds[u.run * s.k + c];
    s.add_point(c, point, 1.0);
    s.weight[c] = 1;
    s.square[c] = s.diagonal[point];
  }
  bool stable = false;
  int64_t iteration = 0;
  while (!stable && iteration < p.max_iterations) {
    const bool given = !p.seeds && iteration == 0;
    if (given) {
      std::copy(p.first_labels, p.first_labels + s.n, s.label);
      std::copy(p.first_sqdist, p.first_sqdist + s.n, s.sqdist);
    } else {
      s.assign();
    }
    ++iteration;
    stable = std::equal(s.label, s.label + s.n, s.old_label);
    if (stable) break;
    s.choose_members();
    if (!given) s.cross_products();
    s.update(iteration == 1);
    std::copy(s.label, s.label + s.n, s.old_label);
    if ((given ? s.shift_from(p.first_sqdist) : s.shift()) <= u.least_shift) break;
  }
  if (!stable) s.assign();
  std::copy(s.label, s.label + s.n, u.labels);
  std::copy(s.old_member, s.old_member + s.n, u.members);
  *u.iterations = iteration;
  *u.inertia = s.inertia();
}

}  // namespace
