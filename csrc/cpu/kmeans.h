// k-means in two spaces: of the inner products of all points (points_gram, seed, lloyd), which are few where points are
// few and long, or of the points themselves (assign). update makes the centroids of both. Many problems in one call.
//
// The order of every sum depends on the shapes of its own problem alone, so the bits do not depend on the threads or on
// other problems. Inner products are summed in float32 for 1024 columns or more at a time, then in float64.
#pragma once
#include <vector>

#include "../lorakern.h"

namespace lorakern::cpu {

void points_gram(const std::vector<PointsGramProblem>& problems, int threads);
void assign(const std::vector<AssignProblem>& problems, int threads);
void update(const std::vector<UpdateProblem>& problems, int threads);
void seed(const std::vector<SeedProblem>& problems, int threads);
void lloyd(const std::vector<LloydProblem>& problems, int threads);

}  // namespace lorakern::cpu
