// The gradients of bgmv: which units of work they consist of, and the arithmetic of scale and gates.
#include <cstring>

#include "lora.h"
#include "schedule.h"

namespace lorakern::cpu {
namespace {

// dots[pair] = h . dh, the gradient of a pair's factor, and that factor into both. In double: terms cancel.
void apply_factors(const LoraGradParams& g, const Pairs& group, double* dots) {
  const LoraParams& p = g.forward;
  const int64_t pairs = p.num_tokens * p.num_choices, rank = rank_of(p, group.slot);
  for (int64_t i = 0; i < group.count; ++i) {
    const int64_t pair = group.ids[i];
    const float factor = factor_of(p, p.gates, group.slot, pair);
    double dot = 0;
    for (int s = 0; s < p.num_slices; ++s) {
      float *h = p.h + (s * pairs + pair) * p.r_max, *dh = g.dh + (s * pairs + pair) * p.r_max;
      for (int64_t r = 0; r < rank; ++r) {
        dot += static_cast<double>(h[r]) * dh[r];
        h[r] *= factor;
        dh[r] *= factor;
      }
    }
    dots[pair] = dot;
  }
}

// Sums over pairs in the order of the plan.
void factor_gradients(const LoraGradParams& g, const std::vector<Pairs>& groups, const double* dots) {
  const LoraParams& p = g.forward;
  double dscale = 0;
  for (const Pairs& group : groups) {
    if (group.ids == p.plan.order + p.plan.starts[group.slot]) dscale = 0;
    for (int64_t i = 0; i < group.count; ++i) {
      const int64_t pair = group.ids[i];
      dscale += dots[pair] * (p.gates ? p.gates[pair] : 1.0f);
      if (g.dgates) g.dgates[pair] = static_cast<float>(dots[pair] * (p.scale ? p.scale[group.slot] : 1.0f));
    }
    if (g.dscale) g.dscale[group.slot] = static_cast<float>(dscale);
  }
}

// Zeros where no unit of work writes: in the gradients of one slot, of all its ranks if it was not used, ...
void clear_slot(const LoraGradParams& g, int64_t slot) {
  const LoraParams& p = g.forward;
  const size_t bytes = element_size(p.dtype);
  const bool used = p.plan.starts[slot] < p.plan.starts[slot + 1];
  const int64_t rank = used ? rank_of(p, slot) : 0, beyond = p.r_max - rank;
  if (beyond == 0) return;
  for (int s = 0; s < p.num_slices; ++s) {
    char *dA = static_cast<char*>(g.dA[s]), *dB = static_cast<char*>(g.dB[s]);
    if (dA) std::memset(dA + (slot * p.r_max + rank) * p.d_in * bytes, 0, beyond * p.d_in * bytes);
    if (dB && rank == 0) std::memset(dB + slot * p.B[s].rows * p.r_max * bytes, 0, p.B[s].rows * p.r_max * bytes);
    for (int64_t o = 0; dB && rank > 0 && o < p.B[s].rows; ++o)
      std::memset(dB + ((slot * p.B[s].rows + o) * p.r_max + rank) * bytes, 0, beyond * bytes);
  }
}

// ... and in dx, of the tokens without an adapter.
void clear_tokens(const LoraGradParams& g, const uint8_t* served) {
  const LoraParams& p = g.forward;
  const size_t row = p.d_in * element_size(p.dtype);
  for (int64_t t = 0; t < p.num_tokens; ++t)
    if (!served[t]) std::memset(static_cast<char*>(g.dx) + t * row, 0, row);
}

struct OuterUnit {
  OuterJob job;
  int64_t slot, begin, end;
};

void split_outer(const OuterJob& job, std::vector<OuterUnit>& units) {
  constexpr int64_t kColumns = 512;
  const LoraParams& p = *job.params;
  for (int64_t slot = 0; slot < p.num_slots; ++slot)
    if (p.plan.starts[slot] < p.plan.starts[slot + 1] && rank_of(p, slot) > 0)
      for (int64_t begin = 0; begin < job.columns; begin += kColumns)
        units.push_back({job, slot, begin, std::min(begin + kColumns, job.columns)});
}

}  // namespace

void backward(LoraGradParams g, const Indices& indices, int threads) {
  static thread_local Scratch<float> h_scratch;
  static thread_local Scratch<double> dots_scratch;
  LoraParams& p = g.forward;
  check_ranks(p);
  complete_plan(p, indices);
  const Variant& variant = variant_for(p.dtype);
  const int64_t pairs = p.num_tokens * p.num_choices, size = p.num_slices * pairs * p.r_max;
  p.h = h_scratch.get(2 * size);
  g.dh = p.h + size;
  double* dots = dots_scratch.get(pairs);
  threads = threads_for(p, p.d_in + columns_of(p), threads);

  std::vector<Pairs> groups;
  make_groups(p, std::clamp<int64_t>(pairs / (kUnitsPerThread * threads), 16, 128), groups);
  parallel_for(threads, static_cast<int64_t>(groups.size()), [&](int64_t i) {
    for (int s = 0; s < p.num_slices; ++s) {
      run_shrink_unit(p, {s, groups[i], 0, rank_of(p, groups[i].slot)}, variant);
      variant.back(g, {s, groups[i]}, unit_scratch(variant.back_scratch()));
    }
    apply_factors(g, groups[i], dots);
  });
  factor_gradients(g, groups, dots);

  std::vector<ExpandUnit> expand_units;
  const uint8_t* served = served_tokens(p, groups);
  if (g.dx) clear_tokens(g, served);
  const bool sums = p.num_choices * p.num_slices > 1;
  ExpandJob dx{&p, p.A, {}, p.num_slices, false, false, g.dx, p.d_in, false, sums ? served : nullptr, nullptr};
  for (int s = 0; s < p.num_slices; ++s) dx.left[s] = g.dh + s * pairs * p.r_max;
  if (g.dx) split_expand(dx, p.d_in, variant.panel_columns, threads, groups, expand_units);
  std::vector<OuterUnit> outer_units;
  const char* dy = static_cast<const char*>(g.dy);
  for (int s = 0; s < p.num_slices; ++s) {
    const int64_t offset = s * pairs * p.r_max;
    if (g.dA[s]) split_outer({&p, g.dh + offset, p.x, p.x_stride, g.dA[s], p.d_in, false}, outer_units);
    if (g.dB[s]) split_outer({&p, p.h + offset, dy, g.dy_stride, g.dB[s], p.B[s].rows, true}, outer_units);
    dy += p.B[s].rows * element_size(p.dtype);
  }
  const int64_t expands = static_cast<int64_t>(expand_units.size()), outers = static_cast<int64_t>(outer_units.size());
  parallel_for(threads, expands + outers + p.num_slots, [&](int64_t i) {
    if (i < expands) return run_expand_unit(dx, expand_units[i], variant);
    if (i >= expands + outers) return clear_slot(g, i - expands - outers);
    const OuterUnit& unit = outer_units[i - expands];
    variant.outer(unit.job, unit.slot, unit.begin, unit.end,
                  unit_scratch(variant.outer_scratch(p, unit.end - unit.begin)));
  });
}

}  // namespace lorakern::cpu
