// Does a tensor hold NaN or infinity? On the calling thread: files are checked while others compute.
#pragma once
#include "../lorakern.h"

namespace lorakern::cpu {

bool all_finite(const void* data, Dtype dtype, int64_t count);

}  // namespace lorakern::cpu
