// Inner products in float64 of rows of any dtype and strides, for many problems at once.
//
// The order of the sums depends on the shapes alone, so the bits do not depend on the threads or on other problems. An
// element of `gram` and `sketch` is summed in runs of 128 products, 8 runs to a stretch, then stretch by stretch: its
// error is at most (136 + columns / 1024) 2^-53 times the sum of the products' magnitudes.
#pragma once
#include <vector>

#include "../lorakern.h"

namespace lorakern::cpu {

void gram(const std::vector<GramProblem>& problems, int threads);
void sketch(const std::vector<SketchProblem>& problems, int threads);
void lines(const std::vector<LinesProblem>& problems, int threads);
void combine(const std::vector<CombineProblem>& problems, int threads);

}  // namespace lorakern::cpu
