// attention_gates and routed_bgmv: the shrink of the router beside that of the adapters, logits, and their softmax.
#include <cmath>
#include <limits>

#include "lora.h"
#include "schedule.h"

namespace lorakern::cpu {
namespace {

int64_t query_size(const RouterParams& r) { return r.lora.num_slices * r.lora.num_tokens * r.router_rank; }

int64_t gates_size(const RouterParams& r) { return r.lora.num_slices * r.lora.num_tokens * r.lora.num_choices; }

// query = router_A x: to a shrink the router is the one adapter that every token has.
void run_query(const RouterParams& r, const Variant& variant, int threads) {
  static thread_local Scratch<int32_t> scratch;
  const int64_t tokens = r.lora.num_tokens;
  int32_t* order = scratch.get(tokens + 2);
  for (int64_t t = 0; t < tokens; ++t) order[t] = static_cast<int32_t>(t);
  order[tokens] = 0;
  order[tokens + 1] = static_cast<int32_t>(tokens);
  LoraParams p = r.lora;
  p.num_choices = p.num_slots = 1;
  p.r_max = r.router_rank;
  p.ranks = nullptr;
  p.h = r.query;
  p.plan = {order, order + tokens};
  std::copy(r.router_A, r.router_A + p.num_slices, p.A);
  run_shrink(p, variant, threads);
}

// The gates of `choices` logits, in their place; logits of -infinity are of no adapter.
void softmax(float* logits, int64_t choices) {
  constexpr float kAbsent = -std::numeric_limits<float>::infinity();
  float most = kAbsent, sum = 0;
  for (int64_t k = 0; k < choices; ++k) most = std::max(most, logits[k]);
  for (int64_t k = 0; k < choices; ++k) sum += logits[k] = logits[k] == kAbsent ? 0.0f : std::exp(logits[k] - most);
  for (int64_t k = 0; k < choices; ++k) logits[k] = sum == 0.0f ? 0.0f : logits[k] / sum;
}

// Gates from h and query. Slots of rank 0 take part: their update is zero, and so is their logit.
void run_gates(const RouterParams& r, const Variant& variant, int threads) {
  constexpr int64_t kPairs = 64, kRows = 256;
  static thread_local std::vector<GateUnit> units;
  const LoraParams& p = r.lora;
  threads = threads_for(p, r.router_rank, threads);
  std::fill(r.gates, r.gates + gates_size(r), -std::numeric_limits<float>::infinity());
  units.clear();
  for (int64_t slot = 0; slot < p.num_slots; ++slot)
    for (int64_t i = p.plan.starts[slot], last = p.plan.starts[slot + 1]; i < last; i += kPairs)
      for (int s = 0; s < p.num_slices; ++s) units.push_back({s, {slot, p.plan.order + i, std::min(kPairs, last - i)}});
  const std::vector<GateUnit>& shared = units;  // thread_local: the workers must not look up their own
  parallel_for(threads, static_cast<int64_t>(units.size()), [&](int64_t i) { variant.gate(r, shared[i]); });
  const int64_t rows = p.num_slices * p.num_tokens;
  parallel_for(threads, (rows + kRows - 1) / kRows, [&](int64_t i) {
    for (int64_t row = i * kRows; row < std::min(rows, (i + 1) * kRows); ++row)
      softmax(r.gates + row * p.num_choices, p.num_choices);
  });
}

}  // namespace

void attention_gates(RouterParams r, const Indices& indices, int threads) {
  static thread_local Scratch<float> scratch;
  check_ranks(r.lora);
  complete_plan(r.lora, indices);
  r.query = scratch.get(query_size(r));
  const Variant& variant = variant_for(r.lora.dtype);
  run_query(r, variant, threads);
  run_gates(r, variant, threads);
}

void routed_bgmv(RouterParams r, const Indices& indices, int threads) {
  static thread_local Scratch<float> scratch;
  LoraParams& p = r.lora;
  check_ranks(p);
  check_memory(p);
  check_router_memory(r);
  complete_plan(p, indices);
  p.h = scratch.get(h_size(p) + query_size(r) + gates_size(r));
  r.query = p.h + h_size(p);
  r.gates = r.query + query_size(r);
  const Variant& variant = variant_for(p.dtype);
  run_shrink(p, variant, threads);
  run_query(r, variant, threads);
  run_gates(r, variant, threads);
  p.gates = r.gates;
  p.gates_stride = p.num_tokens * p.num_choices;
  run_expand(p, variant, threads);
}

}  // namespace lorakern::cpu
