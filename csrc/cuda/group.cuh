// Which pairs a block (or the blocks of a cluster) serves: up to N of one slot.
#pragma once
#include <ptx.cuh>

#include "common.cuh"

namespace lorakern::cuda {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
static_assert(kUnplannedPairs == kThreads, "a thread looks at one pair");

// Groups are numbered so that a block finds its own without a pass over all of them; some numbers are of no group.
//   without a plan  by the position of the group's first pair, 0 .. pairs - 1. At most kUnplannedPairs.
//   step = 1        by the position of the first pair in the plan's order: fewest numbers where slots are many
//   step = N        group j of slot s is starts[s] / N + s + j: fewest numbers where slots are few
struct Groups {
  int64_t count;
  int step;
};

template <int N>
inline Groups groups_of(const Routing& r) {
  const int64_t pairs = pairs_of(r), by_slot = pairs / N + r.num_slots + 1;
  if (r.plan.order == nullptr || pairs <= by_slot) return {pairs, 1};
  return {by_slot, N};
}

template <int N>
struct Members {  // in shared memory
  int pair[N];
  int64_t token[N];
  float factor[N];  // gate * scale
  unsigned same[kWarps];

  __device__ __forceinline__ void set(int place, const Routing& r, int64_t p, float f) {
    pair[place] = static_cast<int>(p);
    token[place] = split(r, p).token;
    factor[place] = f;
  }
};

struct Group {  // the same in every thread
  int slot, rank, count;
};

// The lowest `count` bits; none if it is negative.
__device__ __forceinline__ unsigned low_bits(int count) {
  return count <= 0 ? 0u : count >= 32 ? 0xffffffffu : (1u << count) - 1u;
}

// Every load but those of the members' own pairs is begun before the first barrier: they wait for memory once.
template <int N>
__device__ Group find_in_indices(const Routing& r, int number, Members<N>& members) {
  const int thread = threadIdx.x, pairs = static_cast<int>(pairs_of(r));
  const int mine = thread < pairs ? slot_of(r, thread) : -1, slot = slot_of(r, number);
  const float gate = thread < pairs ? gate_of(r, thread) : 0.0f, scale = slot < 0 ? 0.0f : scale_of(r, slot);
  const int rank = rank_of(r, slot);
  const unsigned same = __ballot_sync(0xffffffffu, mine == slot);
  if (thread % kWarp == 0) members.same[thread / kWarp] = same;
  __syncthreads();
  int before = 0, total = 0, place = 0;  // pairs of the slot: before the first of this group, in all, before mine
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) {
    const unsigned word = members.same[warp];
    before += __popc(word & low_bits(number - warp * kWarp));
    place += __popc(word & low_bits(thread - warp * kWarp));
    total += __popc(word);
  }
  if (slot < 0 || before % N != 0) return {-1, 0, 0};
  if (mine == slot && place >= before && place < before + N) members.set(place - before, r, thread, gate * scale);
  return {slot, rank, min(N, total - before)};
}

template <int N>
__device__ Group find_in_plan(const Routing& r, int64_t number, int step, Members<N>& members) {
  const int64_t pairs = pairs_of(r);
  auto first_number = [&](int64_t s) -> int64_t { return r.plan.starts[s] / step + (step > 1 ? s : 0); };
  int slot = -1;  // the last one whose first number is not past this one
  for (int64_t s = threadIdx.x; s - threadIdx.x <= r.num_slots; s += kThreads) {
    slot += __syncthreads_count(s <= r.num_slots && first_number(s) <= number);
  }
  if (slot < 0 || slot >= r.num_slots) return {-1, 0, 0};
  const int rank = rank_of(r, slot);
  const int64_t start = r.plan.starts[slot], stop = r.plan.starts[slot + 1];
  const int64_t ahead = (number - first_number(slot)) * step, begin = start + ahead;
  if (ahead % N != 0 || begin < 0 || begin >= stop || stop > pairs) return {-1, 0, 0};
  const int count = static_cast<int>(stop - begin < N ? stop - begin : N), thread = threadIdx.x;
  if (thread < count) {
    const int64_t pair = r.plan.order[begin + thread], inside = pair < 0 ? 0 : pair >= pairs ? pairs - 1 : pair;
    members.set(thread, r, inside, gate_of(r, inside) * scale_of(r, slot));
  }
  return {slot, rank, count};
}

// The group of a number; its count is 0 where there is none or nothing to do. Members are there after a barrier.
template <int N>
__device__ Group find_group(const Routing& r, int64_t number, int step, Members<N>& members) {
  const Group group = r.plan.order == nullptr ? find_in_indices(r, static_cast<int>(number), members)
                                              : find_in_plan(r, number, step, members);
  return group.rank > 0 ? group : Group{-1, 0, 0};
}

}  // namespace lorakern::cuda
