// What the ops do before any work: the plan, and the checks of values and memory.
#pragma once
#include <cstddef>

#include "lora.h"

namespace lorakern::cpu {

inline size_t element_size(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

inline int64_t columns_of(const LoraParams& p) {
  int64_t columns = 0;
  for (int s = 0; s < p.num_slices; ++s) columns += p.B[s].rows;
  return columns;
}

// Make the plan if the caller brought none, in memory that this thread keeps until its next call; check it if he did.
void complete_plan(LoraParams& p, const Indices& indices);

void check_ranks(const LoraParams& p);

// y is written while x and the weights are read: they must not share memory, but for columns of one wide matrix.
void check_memory(const LoraParams& p);

// The same of the router and the cores.
void check_router_memory(const RouterParams& r);

}  // namespace lorakern::cpu
