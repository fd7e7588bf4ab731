// Which units of work the inner products of rows consist of, and how their results add up. The sums are in gram_unit.h.
#include "gram.h"

#include <algorithm>

#include "schedule.h"

namespace lorakern::cpu {
namespace {

constexpr int64_t kStretch = 1024;               // columns of a unit: a problem of some thousand keeps all threads busy
constexpr int64_t kPartialDoubles = 1 << 22;     // of the units' results that are kept at a time
constexpr int64_t kLeastParallelWork = 1 << 18;  // products that take as long as waking the threads

using Unit = int64_t (*)(int64_t width);  // doubles that a unit writes

int64_t stretches_of(const Rows& x) { return (x.columns + kStretch - 1) / kStretch; }

template <typename Problem>
int64_t results_of(const Problem&) {
  return 0;
}
inline int64_t results_of(const CombineProblem& problem) { return problem.y.rows; }

// Run `unit` on every stretch of every problem, and then finish(problem, results of its stretches, doubles of each).
template <typename Problem, typename Finish>
void by_stretches(const std::vector<Problem>& problems, int threads, Unit doubles_of,
                  void (*unit)(const ColumnUnit<Problem>&, double*), const Variant& variant, const Finish& finish) {
  static thread_local Scratch<double> results_scratch;
  const auto count = static_cast<int64_t>(problems.size());
  std::vector<ColumnUnit<Problem>> units;
  std::vector<int64_t> offsets;
  for (int64_t first = 0, last; first < count; first = last) {
    int64_t doubles = 0, work = 0;
    offsets.clear();
    for (last = first; last < count && (last == first || doubles < kPartialDoubles); ++last) {
      const Rows& x = problems[last].x;
      offsets.push_back(doubles);
      doubles += doubles_of(variant.packed_width(x.rows)) * stretches_of(x);
      work += x.rows * x.columns * kProbes;
    }
    double* results = results_scratch.get(doubles);
    units.clear();
    for (int64_t i = first; i < last; ++i) {
      const Rows& x = problems[i].x;
      double* out = results + offsets[i - first];
      for (int64_t begin = 0; begin < x.columns; begin += kStretch, out += doubles_of(variant.packed_width(x.rows)))
        units.push_back({&problems[i], begin, std::min(begin + kStretch, x.columns), out});
    }
    const int some = work < kLeastParallelWork ? 1 : threads;
    parallel_for(some, static_cast<int64_t>(units.size()), [&](int64_t i) {
      static thread_local Scratch<double> scratch;
      const Problem& problem = *units[i].problem;
      unit(units[i], scratch.get(variant.packed_scratch(problem.x.rows, results_of(problem))));
    });
    parallel_for(some, last - first, [&](int64_t i) {
      const Problem& problem = problems[first + i];
      finish(problem, results + offsets[i], doubles_of(variant.packed_width(problem.x.rows)));
    });
  }
}

double add_up(const double* results, int64_t stretches, int64_t step) {
  double sum = 0;
  for (int64_t s = 0; s < stretches; ++s) sum += results[s * step];
  return sum;
}

}  // namespace

void gram(const std::vector<GramProblem>& problems, int threads) {
  const Variant& variant = variant_for(Dtype::kFloat32);
  const auto finish = [&](const GramProblem& p, const double* results, int64_t step) {
    const int64_t n = p.x.rows, width = variant.packed_width(n);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = i; j < n; ++j)
        p.out[i * n + j] = p.out[j * n + i] = add_up(results + i * width + j, stretches_of(p.x), step);
  };
  by_stretches(problems, threads, [](int64_t width) { return width * width; }, variant.gram, variant, finish);
}

void sketch(const std::vector<SketchProblem>& problems, int threads) {
  const Variant& variant = variant_for(Dtype::kFloat32);
  const auto finish = [&](const SketchProblem& p, const double* results, int64_t step) {
    const int64_t width = variant.packed_width(p.x.rows);
    for (int64_t r = 0; r < p.x.rows; ++r) {
      double* out = p.out + r * (kProbes + 1);
      for (int j = 0; j <= kProbes; ++j) out[j] = add_up(results + j * width + r, stretches_of(p.x), step);
    }
  };
  const Unit doubles = [](int64_t width) { return width * (kProbes + 1); };
  by_stretches(problems, threads, doubles, variant.sketch, variant, finish);
}

void lines(const std::vector<LinesProblem>& problems, int threads) {
  const Variant& variant = variant_for(Dtype::kFloat32);
  const auto finish = [&](const LinesProblem& p, const double* results, int64_t step) {
    const int64_t stretches = stretches_of(p.x);
    for (int n : {0, 1, 4}) p.out[n] = add_up(results + n, stretches, step);
    p.out[2] = p.out[3] = p.out[5] = 0;
    for (int64_t s = stretches - 1; s >= 0; --s) {
      const double* of = results + s * step;
      if (of[2] >= p.out[2]) p.out[2] = of[2], p.out[3] = of[3];
      if (of[4] > 0) p.out[5] = of[5];
    }
  };
  by_stretches(problems, threads, [](int64_t) -> int64_t { return kLineNumbers; }, variant.lines, variant, finish);
}

void combine(const std::vector<CombineProblem>& problems, int threads) {
  const Variant& variant = variant_for(Dtype::kFloat32);
  const auto finish = [](const CombineProblem&, const double*, int64_t) {};
  by_stretches(problems, threads, [](int64_t) -> int64_t { return 0; }, variant.combine, variant, finish);
}

}  // namespace lorakern::cpu
