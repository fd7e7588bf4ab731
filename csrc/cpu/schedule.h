// The split of an op into units of work for the threads. It never changes a result: every output is summed by one unit.
#pragma once
#include <algorithm>
#include <vector>

#include "arguments.h"
#include "scratch.h"
#include "threads.h"
#include "variant.h"

namespace lorakern::cpu {

constexpr int64_t kUnitsPerThread = 4;  // enough for threads that take the next unit to finish together

const Variant& variant_for(Dtype dtype);

// Scratch of one unit of work, of whichever thread runs it.
inline float* unit_scratch(int64_t floats) {
  static thread_local Scratch<float> scratch;
  return scratch.get(floats);
}

// Fewer threads for little work: waking one costs about as much as this many multiply-adds.
inline int threads_for(const LoraParams& p, int64_t width, int threads) {
  constexpr int64_t kWorthAThread = 1 << 17;
  const int64_t work = p.num_tokens * p.num_choices * p.r_max * width;
  return static_cast<int>(std::min<int64_t>(threads, work / kWorthAThread + 1));
}

// The pairs of every slot that has any and whose rank is not 0, in ascending order of slot, `most` at a time.
inline void make_groups(const LoraParams& p, int64_t most, std::vector<Pairs>& groups) {
  groups.clear();
  for (int64_t slot = 0; slot < p.num_slots; ++slot) {
    const int64_t first = p.plan.starts[slot], last = p.plan.starts[slot + 1];
    if (first == last || rank_of(p, slot) == 0) continue;
    for (int64_t i = first; i < last; i += most) groups.push_back({slot, p.plan.order + i, std::min(most, last - i)});
  }
}

// served[t]: has token t an adapter?
inline const uint8_t* served_tokens(const LoraParams& p, const std::vector<Pairs>& groups) {
  static thread_local Scratch<uint8_t> scratch;
  uint8_t* served = scratch.get(p.num_tokens + 1);
  std::fill(served, served + p.num_tokens, 0);
  for (const Pairs& group : groups)
    for (int64_t i = 0; i < group.count; ++i) served[token_of(p, group.ids[i])] = 1;
  return served;
}

// Ranges of columns of a job for all groups, a few to a thread. Where tokens may get several terms a unit has every
// group, and as many columns as the sums of all tokens leave room for; else a group each.
inline void split_expand(const ExpandJob& job, int64_t columns, int64_t panel, int threads,
                         const std::vector<Pairs>& groups, std::vector<ExpandUnit>& units) {
  const LoraParams& p = *job.params;
  const int64_t tokens = p.num_tokens, num_groups = static_cast<int64_t>(groups.size());
  if (num_groups == 0) return;
  const bool sums = job.served != nullptr;
  int64_t ranges = sums ? threads : (kUnitsPerThread * threads + num_groups - 1) / num_groups;
  if (sums) ranges = std::max(ranges, (columns * tokens + kSumFloats - 1) / kSumFloats);
  const int64_t width = ((columns + ranges - 1) / ranges + panel - 1) / panel * panel;
  for (int64_t i = 0; i < num_groups; i += sums ? num_groups : 1)
    for (int64_t begin = 0; begin < columns; begin += width)
      units.push_back({&groups[i], sums ? num_groups : 1, 0, tokens, begin, std::min(begin + width, columns)});
}

inline void run_expand_unit(const ExpandJob& job, const ExpandUnit& unit, const Variant& variant) {
  variant.expand(job, unit, unit_scratch(variant.expand_scratch(job, unit)));
}

inline void run_shrink_unit(const LoraParams& p, const ShrinkUnit& unit, const Variant& variant) {
  variant.shrink(p, unit, unit_scratch(variant.shrink_scratch(unit)));
}

inline int64_t h_size(const LoraParams& p) { return p.num_slices * p.num_tokens * p.num_choices * p.r_max; }

// h = A x for all groups: units of some tokens and some ranks.
void run_shrink(const LoraParams& p, const Variant& variant, int threads);

// y (+)= the sums of B h for all groups: units of some columns.
void run_expand(const LoraParams& p, const Variant& variant, int threads);

}  // namespace lorakern::cpu
