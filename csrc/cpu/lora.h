// The CPU ops as the binding calls them: plan, shrink, expand, both at once, and their backward.
#pragma once
#include <string>
#include <vector>

#include "../lorakern.h"

namespace lorakern::cpu {

struct Indices {  // (T, K) integers of 4 or 8 bytes
  const void* data;
  int64_t bytes, row_stride, column_stride;
};

// Everything below throws std::invalid_argument for an index that is no slot, a rank beyond r_max, or a y that shares
// memory with an input; nothing has been written then.
void make_plan(const Indices& indices, int64_t tokens, int64_t choices, int64_t num_slots, int32_t* order,
               int32_t* starts);

// `params.plan` may be empty: it is then made from `indices`. `params.h` is scratch of the callee where null.
void shrink(LoraParams params, const Indices& indices, int threads);
void expand(LoraParams params, const Indices& indices, int threads);
void bgmv(LoraParams params, const Indices& indices, int threads);
// `params.query` is scratch of the callee; so are the `h` and `gates` of routed_bgmv.
void attention_gates(RouterParams params, const Indices& indices, int threads);
void routed_bgmv(RouterParams params, const Indices& indices, int threads);
void backward(LoraGradParams grads, const Indices& indices, int threads);

// ISA variants that this CPU can run, slowest first; the last one is used unless another is forced by name.
std::vector<std::string> usable_isas();
std::string current_isa();
void force_isa(const std::string& name);

}  // namespace lorakern::cpu
