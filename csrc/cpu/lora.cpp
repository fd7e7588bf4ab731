// shrink, expand and bgmv: which units of work they consist of. No arithmetic of its own.
#include "lora.h"

#include <cstring>

#include "schedule.h"

namespace lorakern::cpu {
namespace {

constexpr int64_t kGroupTokens = 256, kLeastGroupTokens = 64;  // enough to repay the packing of weights

// One job per slice: the columns of y that it fills.
void expand_jobs(const LoraParams& p, const uint8_t* served, ExpandJob* jobs) {
  char* y = static_cast<char*>(p.y);
  for (int s = 0; s < p.num_slices; ++s) {
    const float* h = p.h + s * p.num_tokens * p.num_choices * p.r_max;
    const float* gates = p.gates ? p.gates + s * p.gates_stride : nullptr;
    jobs[s] = {&p, &p.B[s], {h}, 1, true, true, y, p.y_stride, p.accumulate, served, gates};
    y += p.B[s].rows * element_size(p.dtype);
  }
}

// How long a group takes from x to y, in multiply-adds of a token and a weight.
int64_t cost_of(const LoraParams& p, const Pairs& group) {
  constexpr int64_t kWeights = 8;  // reading weights from memory takes as long as the sums of this many tokens
  constexpr int64_t kToken = 8;    // reading x and y, as long as the sums of this many ranks
  return (rank_of(p, group.slot) + kToken) * (group.count + kWeights);
}

// Can every group be computed from x to y on its own, and would the threads, each taking the next group when it is done
// with one, finish at about the same time? Puts the long ones first.
bool can_fuse(const LoraParams& p, std::vector<Pairs>& groups, int threads) {
  if (p.num_choices > 1) return false;
  if (threads == 1) return true;
  std::sort(groups.begin(), groups.end(), [&](const Pairs& left, const Pairs& right) {
    const int64_t l = cost_of(p, left), r = cost_of(p, right);
    return l != r ? l > r : left.ids < right.ids;
  });
  static thread_local std::vector<int64_t> loads;
  loads.assign(threads, 0);
  int64_t total = 0;
  for (const Pairs& group : groups) {
    *std::min_element(loads.begin(), loads.end()) += cost_of(p, group);
    total += cost_of(p, group);
  }
  return *std::max_element(loads.begin(), loads.end()) * threads <= total + total / 8;
}

// The beginning of a slot's B, on its way from memory while A is read.
void prefetch(const LoraParams& p, const Weight& weight, int64_t slot) {
  constexpr int64_t kBytes = 2048, kLine = 64;
  const int64_t rank = rank_of(p, slot), stride = p.packed ? rank : weight.row_stride;
  const int64_t size = element_size(p.dtype), held = ((weight.rows - 1) * stride + rank) * size;
  const char* begin = static_cast<const char*>(weight.data) + slot * weight.slot_stride * size;
  for (int64_t at = 0; at < std::min(kBytes, held); at += kLine) __builtin_prefetch(begin + at);
}

// Group by group from x to y: h does not leave the cache.
void run_fused(const LoraParams& p, const std::vector<Pairs>& groups, const Variant& variant, int threads) {
  ExpandJob jobs[kMaxSlices];
  expand_jobs(p, nullptr, jobs);
  parallel_for(threads, static_cast<int64_t>(groups.size()), [&](int64_t i) {
    const Pairs& group = groups[i];
    for (int s = 0; s < p.num_slices; ++s) {
      prefetch(p, p.B[s], group.slot);
      run_shrink_unit(p, {s, group, 0, rank_of(p, group.slot)}, variant);
      if (p.B[s].rows > 0) run_expand_unit(jobs[s], {&group, 1, 0, p.num_tokens, 0, p.B[s].rows}, variant);
    }
  });
}

}  // namespace

void run_expand(const LoraParams& p, const Variant& variant, int threads) {
  static thread_local std::vector<Pairs> groups;
  static thread_local std::vector<ExpandUnit> units;
  make_groups(p, kGroupTokens, groups);
  ExpandJob jobs[kMaxSlices];
  expand_jobs(p, p.num_choices > 1 ? served_tokens(p, groups) : nullptr, jobs);
  units.clear();
  int64_t ends[kMaxSlices];
  threads = threads_for(p, columns_of(p), threads);
  for (int s = 0; s < p.num_slices; ++s) {
    split_expand(jobs[s], p.B[s].rows, variant.panel_columns, threads, groups, units);
    ends[s] = static_cast<int64_t>(units.size());
  }
  const std::vector<ExpandUnit>& shared = units;  // thread_local: the workers must not look up their own
  parallel_for(threads, static_cast<int64_t>(units.size()), [&](int64_t i) {
    int s = 0;
    while (i >= ends[s]) ++s;
    run_expand_unit(jobs[s], shared[i], variant);
  });
}

void run_shrink(const LoraParams& p, const Variant& variant, int threads) {
  constexpr int64_t kTokens = 64;
  const int64_t tile = variant.tile_ranks;
  static thread_local std::vector<Pairs> groups;
  static thread_local std::vector<ShrinkUnit> units;
  units.clear();
  make_groups(p, kTokens, groups);
  threads = threads_for(p, p.d_in, threads);
  const int64_t parts = static_cast<int64_t>(groups.size()) * p.num_slices;
  if (parts == 0) return;
  int64_t rows = p.r_max * parts / (threads > 1 ? kUnitsPerThread * threads : 1);
  rows = std::clamp<int64_t>((rows + tile - 1) / tile * tile, 1, p.r_max);
  for (const Pairs& group : groups)
    for (int s = 0; s < p.num_slices; ++s)
      for (int64_t row = 0, rank = rank_of(p, group.slot); row < rank; row += rows)
        units.push_back({s, group, row, std::min(row + rows, rank)});
  const std::vector<ShrinkUnit>& shared = units;  // thread_local: the workers must not look up their own
  parallel_for(threads, static_cast<int64_t>(units.size()), [&](int64_t i) { run_shrink_unit(p, shared[i], variant); });
}

void shrink(LoraParams p, const Indices& indices, int threads) {
  check_ranks(p);
  complete_plan(p, indices);
  std::fill_n(p.h, h_size(p), 0.0f);
  run_shrink(p, variant_for(p.dtype), threads);
}

void expand(LoraParams p, const Indices& indices, int threads) {
  check_ranks(p);
  check_memory(p);
  complete_plan(p, indices);
  run_expand(p, variant_for(p.dtype), threads);
}

void bgmv(LoraParams p, const Indices& indices, int threads) {
  static thread_local Scratch<float> scratch;
  static thread_local std::vector<Pairs> groups;
  check_ranks(p);
  check_memory(p);
  complete_plan(p, indices);
  p.h = scratch.get(h_size(p));
  const Variant& variant = variant_for(p.dtype);
  threads = threads_for(p, p.d_in + columns_of(p), threads);
  for (int64_t most = kGroupTokens; most >= kLeastGroupTokens; most /= 2) {
    make_groups(p, most, groups);
    if (can_fuse(p, groups, threads)) return run_fused(p, groups, variant, threads);
  }
  run_shrink(p, variant, threads);
  run_expand(p, variant, threads);
}

}  // namespace lorakern::cpu
