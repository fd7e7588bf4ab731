// Gram matrices of many row sets at once.
#pragma once
#include <vector>

#include "../lorakern.h"

namespace lorakern::cpu {

// problem.out = X X^T for every problem. The order of the sums depends on the shapes alone, so the bits do not depend
// on the threads or on the other problems. An element is summed in runs of 128 products, 8 runs to a stretch, then
// stretch by stretch: its error is at most (136 + columns / 1024) 2^-53 times the sum of the products' magnitudes.
void gram(const std::vector<GramProblem>& problems, int threads);

}  // namespace lorakern::cpu
