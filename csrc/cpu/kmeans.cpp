// Which units of work the clustering of points consists of, and how their results add up. The sums are in
// points_unit.h, centroid_unit.h and lloyd_unit.h.
#include "kmeans.h"

#include <algorithm>

#include "schedule.h"

namespace lorakern::cpu {
namespace {

constexpr int64_t kStretch = 1024;               // columns of a unit at least, where points have so many
constexpr int64_t kMostStretches = 8;            // of the points of a problem, and one more for each further part
constexpr int64_t kGrain = 32;                   // ranges of columns are multiples of it
constexpr int64_t kPartialFloats = 1 << 24;      // of the units' results that are kept at a time
constexpr int64_t kFinishedRows = 64;            // rows of a Gram matrix that are added up at a time
constexpr int64_t kLeastParallelWork = 1 << 18;  // multiply-adds that take as long as waking the threads

int threads_for_work(int64_t work, int threads) { return work < kLeastParallelWork ? 1 : threads; }

double* scratch_of(int64_t doubles) {
  static thread_local Scratch<double> scratch;
  return scratch.get(doubles);
}

// Columns of a unit: there are few, since the results of each are kept until all are there.
int64_t stretch_of(const Points& points, int64_t width) {
  const int64_t units = std::clamp<int64_t>(kPartialFloats / (width * width), 1, kMostStretches);
  return std::max(kStretch, (points.columns + units - 1) / units);
}

// Call f(part, begin, end, first column of the part) for even ranges of about `most` columns of each part at most.
template <typename F>
void for_each_range(const Points& points, int64_t most, const F& f) {
  for (int64_t part = 0, first = 0; part < points.num_parts; first += points.parts[part++].columns) {
    const int64_t columns = points.parts[part].columns, ranges = (columns + most - 1) / most;
    const int64_t width = ((columns + ranges - 1) / ranges + kGrain - 1) / kGrain * kGrain;
    for (int64_t begin = 0; begin < columns; begin += width) f(part, begin, std::min(begin + width, columns), first);
  }
}

struct FinishUnit {
  const PointsGramProblem* problem;
  const float* partial;
  int64_t stretches, width, begin, end;  // rows
};

void finish(const FinishUnit& u) {
  const int64_t n = u.problem->points.count, step = u.width * u.width;
  double* sums = scratch_of(n);
  for (int64_t i = u.begin; i < u.end; ++i) {
    std::fill(sums + i, sums + n, 0.0);
    for (int64_t s = 0; s < u.stretches; ++s)
      for (int64_t j = i; j < n; ++j) sums[j] += u.partial[s * step + i * u.width + j];
    float* out = u.problem->out;
    for (int64_t j = i; j < n; ++j) out[i * n + j] = out[j * n + i] = static_cast<float>(sums[j]);
  }
}

void multiply(const std::vector<const PointsGramProblem*>& problems, bool center, int threads) {
  static thread_local Scratch<float> partial_scratch;
  const Variant& variant = variant_for(Dtype::kFloat32);
  const auto count = static_cast<int64_t>(problems.size());
  std::vector<PointsUnit> units;
  std::vector<FinishUnit> finishes;
  for (int64_t first = 0, last; first < count; first = last) {
    int64_t floats = 0, work = 0;
    units.clear();
    finishes.clear();
    for (last = first; last < count && (last == first || floats < kPartialFloats); ++last) {
      const Points& x = problems[last]->points;
      const int64_t width = variant.packed_width(x.count), begin = floats;
      for_each_range(x, stretch_of(x, width), [&](int64_t part, int64_t from, int64_t to, int64_t) {
        units.push_back({&x, center, part, from, to, nullptr});
        floats += width * width;
      });
      work += x.count * x.count * x.columns;
      for (int64_t row = 0; row < x.count; row += kFinishedRows)
        finishes.push_back({problems[last], nullptr, (floats - begin) / (width * width), width, row,
                            std::min(row + kFinishedRows, x.count)});
    }
    float* partial = partial_scratch.get(floats);
    auto next = finishes.begin();
    for (PointsUnit& u : units) {
      for (; next != finishes.end() && &next->problem->points == u.points; ++next) next->partial = partial;
      u.out = partial;
      partial += variant.packed_width(u.points->count) * variant.packed_width(u.points->count);
    }
    const int some = threads_for_work(work, threads);
    parallel_for(some, static_cast<int64_t>(units.size()), [&](int64_t i) {
      variant.points_gram(units[i], unit_scratch(variant.points_scratch(units[i].points->count)));
    });
    parallel_for(some, static_cast<int64_t>(finishes.size()), [&](int64_t i) { finish(finishes[i]); });
  }
}

// Of points of which the inner products are known: the sum of their squares, and that of the part that is their mean's.
struct Moments {
  double all, mean;
};

Moments moments(const float* gram, int64_t n) {
  constexpr int64_t kLanes = 8;
  double trace = 0, total = 0, lanes[kLanes] = {};
  for (int64_t i = 0; i < n; ++i, gram += n) {
    trace += gram[i];
    int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes)
      for (int64_t l = 0; l < kLanes; ++l) lanes[l] += gram[j + l];
    for (; j < n; ++j) total += gram[j];
  }
  for (double lane : lanes) total += lane;
  return {trace, total / static_cast<double>(n)};
}

}  // namespace

// Distances are small differences of inner products where the mean is large: then without it.
void points_gram(const std::vector<PointsGramProblem>& problems, int threads) {
  std::vector<const PointsGramProblem*> all, off_center;
  for (const PointsGramProblem& p : problems) all.push_back(&p);
  multiply(all, false, threads);
  for (const PointsGramProblem& p : problems) {
    const Moments found = moments(p.out, p.points.count);
    if (2 * found.mean > found.all) off_center.push_back(&p);
  }
  multiply(off_center, true, threads);
}

namespace {

void assign_one(const AssignProblem& p, int threads) {
  static thread_local Scratch<float> center_scratch;
  const Variant& variant = variant_for(Dtype::kFloat32);
  const int64_t columns = p.points.columns, stride = variant.points_stride(p.k), rows = variant.assign_rows(p.k);
  const int64_t stretches = (columns + kStretch - 1) / kStretch;
  float *packed = center_scratch.get((columns + 1) * stride + columns), *mean = packed + columns * stride,
        *squares = mean + columns;
  std::vector<double> partial(stretches * p.k);
  const int some = threads_for_work(p.points.count * p.k * columns, threads);
  parallel_for(some, stretches, [&](int64_t s) {
    const int64_t begin = s * kStretch;
    variant.pack_centers({&p, begin, std::min(begin + kStretch, columns), packed, mean, partial.data() + s * p.k});
  });
  for (int64_t c = 0; c < p.k; ++c) {
    double sum = 0;
    for (int64_t s = 0; s < stretches; ++s) sum += partial[s * p.k + c];
    squares[c] = static_cast<float>(sum);
  }
  parallel_for(some, (p.points.count + rows - 1) / rows, [&](int64_t i) {
    const int64_t begin = i * rows, end = std::min(begin + rows, p.points.count);
    static thread_local std::vector<RowSet> sets;
    static thread_local std::vector<Rows> parts;
    sets.clear();
    parts.clear();
    for (int64_t part = 0; part < p.points.num_parts; ++part) {
      const Rows& all = p.points.parts[part];
      const auto before = static_cast<int64_t>(sets.size());
      for (int64_t s = 0, row = 0; s < all.num_sets; row += all.sets[s++].rows) {
        const RowSet& set = all.sets[s];
        const int64_t from = std::max(begin, row) - row, to = std::min(end - row, set.rows);
        if (from >= to) continue;
        const int64_t skipped = from * set.row_stride * (set.dtype == Dtype::kFloat32 ? 4 : 2);
        sets.push_back(
            {static_cast<const char*>(set.data) + skipped, set.dtype, to - from, set.row_stride, set.column_stride});
      }
      parts.push_back({nullptr, static_cast<int64_t>(sets.size()) - before, end - begin, all.columns});
    }
    const RowSet* next = sets.data();
    for (Rows& part : parts) {
      part.sets = next;
      next += part.num_sets;
    }
    variant.assign({&p, parts.data(), begin, end - begin, packed, mean, squares},
                   unit_scratch(variant.assign_scratch(p.k)));
  });
}

}  // namespace

void assign(const std::vector<AssignProblem>& problems, int threads) {
  for (const AssignProblem& p : problems) assign_one(p, threads);
}

void update(const std::vector<UpdateProblem>& problems, int threads) {
  const Variant& variant = variant_for(Dtype::kFloat32);
  std::vector<UpdateUnit> units;
  int64_t work = 0;
  for (const UpdateProblem& p : problems) {
    std::fill(p.counts, p.counts + p.k, 0.0);
    for (int64_t i = 0; i < p.points.count; ++i) p.counts[p.members[i]] += p.weights[i];
    const bool settled = p.labels && std::equal(p.members, p.members + p.points.count, p.labels);
    for_each_range(p.points, kStretch, [&](int64_t part, int64_t begin, int64_t end, int64_t first) {
      units.push_back({&p, part, first, begin, end, settled, nullptr});
    });
    work += p.points.count * p.points.columns;
  }
  std::vector<double> inertia(units.size());
  for (size_t i = 0; i < units.size(); ++i) units[i].inertia = &inertia[i];
  parallel_for(threads_for_work(work, threads), static_cast<int64_t>(units.size()),
               [&](int64_t i) { variant.update(units[i], scratch_of(variant.update_scratch(units[i]))); });
  for (const UpdateProblem& p : problems) *p.inertia = 0;
  for (size_t i = 0; i < units.size(); ++i) *units[i].problem->inertia += inertia[i];
  for (const UpdateProblem& p : problems) *p.inertia = std::max(*p.inertia, 0.0);
}

void seed(const std::vector<SeedProblem>& problems, int threads) {
  const Variant& variant = variant_for(Dtype::kFloat32);
  std::vector<SeedUnit> units;
  int64_t work = 0;
  for (const SeedProblem& p : problems)
    for (int64_t run = 0; run < p.runs; ++run) {
      units.push_back({&p, run});
      work += p.cloud.count * p.cloud.k * p.trials;
    }
  parallel_for(threads_for_work(work, threads), static_cast<int64_t>(units.size()),
               [&](int64_t i) { variant.seed(units[i], scratch_of(variant.seed_scratch(units[i].problem->cloud))); });
}

namespace {

// Sum over columns of the variance of the points, of which the inner products are known.
double variance(const Cloud& cloud) {
  const Moments found = moments(cloud.gram, cloud.count);
  return std::max(0.0, (found.all - found.mean) / static_cast<double>(cloud.count));
}

}  // namespace

void lloyd(const std::vector<LloydProblem>& problems, int threads) {
  const Variant& variant = variant_for(Dtype::kFloat32);
  std::vector<LloydUnit> units;
  std::vector<double> least_shifts(problems.size());
  int64_t points = 0, work = 0;
  for (const LloydProblem& p : problems) {
    points += p.runs * p.cloud.count;
    work += p.runs * p.cloud.count * p.cloud.count;
  }
  const int some = threads_for_work(work, threads);
  parallel_for(some, static_cast<int64_t>(problems.size()),
               [&](int64_t i) { least_shifts[i] = problems[i].tolerance * variance(problems[i].cloud); });
  std::vector<int64_t> found(2 * points);
  int64_t* next = found.data();
  for (size_t i = 0; i < problems.size(); ++i)
    for (int64_t run = 0; run < problems[i].runs; ++run, next += 2 * problems[i].cloud.count)
      units.push_back({&problems[i], run, least_shifts[i], next, next + problems[i].cloud.count, nullptr, nullptr});
  std::vector<int64_t> iterations(units.size());
  std::vector<double> inertia(units.size());
  for (size_t i = 0; i < units.size(); ++i) units[i].iterations = &iterations[i], units[i].inertia = &inertia[i];
  parallel_for(some, static_cast<int64_t>(units.size()),
               [&](int64_t i) { variant.lloyd(units[i], scratch_of(variant.lloyd_scratch(units[i].problem->cloud))); });
  const LloydUnit* unit = units.data();
  for (const LloydProblem& p : problems) {
    const LloydUnit* best = unit;
    for (const LloydUnit* end = unit + p.runs; unit < end; ++unit)
      if (*unit->inertia < *best->inertia) best = unit;
    std::copy(best->labels, best->labels + p.cloud.count, p.labels);
    std::copy(best->members, best->members + p.cloud.count, p.members);
    *p.iterations = *best->iterations;
  }
}

}  // namespace lorakern::cpu
