// Which units of work Gram matrices consist of, and the sums of their results. The products are in gram_unit.h.
#include "gram.h"

#include <algorithm>

#include "schedule.h"

namespace lorakern::cpu {
namespace {

constexpr int64_t kStretch = 1024;               // columns of a unit: a problem of some thousand keeps all threads busy
constexpr int64_t kPartialDoubles = 1 << 22;     // of the units' results that are kept at a time
constexpr int64_t kLeastParallelWork = 1 << 18;  // products that take as long as waking the threads

int64_t stretches_of(const GramProblem& problem) { return (problem.columns + kStretch - 1) / kStretch; }

// Add the results of a problem's units up in order, and mirror what is right of the diagonal.
void add_up(const GramProblem& problem, const double* partials, int64_t width) {
  const int64_t stretches = stretches_of(problem), n = problem.rows;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = i; j < n; ++j) {
      double sum = 0;
      for (int64_t s = 0; s < stretches; ++s) sum += partials[(s * width + i) * width + j];
      problem.out[i * n + j] = problem.out[j * n + i] = sum;
    }
}

}  // namespace

void gram(const std::vector<GramProblem>& problems, int threads) {
  static thread_local Scratch<double> partial_scratch;
  const Variant& variant = variant_for(Dtype::kFloat32);
  const auto count = static_cast<int64_t>(problems.size());
  std::vector<GramUnit> units;
  std::vector<int64_t> offsets;
  for (int64_t first = 0, last; first < count; first = last) {
    int64_t doubles = 0, work = 0;
    offsets.clear();
    for (last = first; last < count && (last == first || doubles < kPartialDoubles); ++last) {
      const GramProblem& problem = problems[last];
      const int64_t width = variant.gram_width(problem.rows);
      offsets.push_back(doubles);
      doubles += width * width * stretches_of(problem);
      work += problem.rows * problem.rows * problem.columns;
    }
    double* partials = partial_scratch.get(doubles);
    units.clear();
    for (int64_t i = first; i < last; ++i) {
      const GramProblem& problem = problems[i];
      const int64_t width = variant.gram_width(problem.rows);
      double* out = partials + offsets[i - first];
      for (int64_t begin = 0; begin < problem.columns; begin += kStretch, out += width * width)
        units.push_back({&problem, begin, std::min(begin + kStretch, problem.columns), out});
    }
    const int some = work < kLeastParallelWork ? 1 : threads;
    parallel_for(some, static_cast<int64_t>(units.size()), [&](int64_t i) {
      static thread_local Scratch<double> scratch;
      variant.gram(units[i], scratch.get(variant.gram_scratch(units[i].problem->rows)));
    });
    parallel_for(some, last - first, [&](int64_t i) {
      const GramProblem& problem = problems[first + i];
      add_up(problem, partials + offsets[i], variant.gram_width(problem.rows));
    });
  }
}

}  // namespace lorakern::cpu
