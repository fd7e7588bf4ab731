// What the ops do before any work: the plan, and the checks of values and memory. Nothing has been written when one
// throws.
#include "arguments.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "scratch.h"

namespace lorakern::cpu {
namespace {

template <typename Int>
void sort_pairs(const Int* data, int64_t row_stride, int64_t column_stride, int64_t tokens, int64_t choices,
                int64_t num_slots, int32_t* order, int32_t* starts) {
  std::fill(starts, starts + num_slots + 1, 0);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t k = 0; k < choices; ++k) {
      const int64_t slot = data[t * row_stride + k * column_stride];
      if (slot < -1 || slot >= num_slots)
        throw std::invalid_argument(
            "indices must lie between -1 (no adapter) and slots - 1 = " + std::to_string(num_slots - 1) + "; got " +
            std::to_string(slot) + " for token " + std::to_string(t));
      if (slot >= 0) ++starts[slot + 1];
    }
  for (int64_t s = 0; s < num_slots; ++s) starts[s + 1] += starts[s];
  int64_t without = starts[num_slots];
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t k = 0; k < choices; ++k) {
      const int64_t slot = data[t * row_stride + k * column_stride];
      order[slot >= 0 ? starts[slot]++ : without++] = static_cast<int32_t>(t * choices + k);
    }
  for (int64_t s = num_slots; s > 0; --s) starts[s] = starts[s - 1];
  starts[0] = 0;
}

struct Extent {  // bytes
  const char *begin, *end;
};

Extent extent_of(const void* data, int64_t rows, int64_t stride, int64_t columns, int64_t bytes) {
  const char* begin = static_cast<const char*>(data);
  if (rows == 0 || columns == 0) return {begin, begin};
  return {begin, begin + ((rows - 1) * stride + columns) * bytes};
}

bool meet(Extent a, Extent b) { return a.begin < b.end && b.begin < a.end; }

Extent extent_of_y(const LoraParams& p) {
  return extent_of(p.y, p.num_tokens, p.y_stride, columns_of(p), element_size(p.dtype));
}

}  // namespace

void make_plan(const Indices& indices, int64_t tokens, int64_t choices, int64_t num_slots, int32_t* order,
               int32_t* starts) {
  if (indices.bytes == 8)
    sort_pairs(static_cast<const int64_t*>(indices.data), indices.row_stride, indices.column_stride, tokens, choices,
               num_slots, order, starts);
  else
    sort_pairs(static_cast<const int32_t*>(indices.data), indices.row_stride, indices.column_stride, tokens, choices,
               num_slots, order, starts);
}

void complete_plan(LoraParams& p, const Indices& indices) {
  const int64_t pairs = p.num_tokens * p.num_choices;
  if (p.plan.order) {
    bool sound = p.plan.starts[0] == 0 && p.plan.starts[p.num_slots] <= pairs;
    for (int64_t s = 0; s < p.num_slots; ++s) sound &= p.plan.starts[s] <= p.plan.starts[s + 1];
    for (int64_t i = 0; i < pairs; ++i) sound &= p.plan.order[i] >= 0 && p.plan.order[i] < pairs;
    if (!sound)
      throw std::invalid_argument("plan must be what lorakern.plan(indices, num_slots) returned; its values are not");
    return;
  }
  static thread_local Scratch<int32_t> scratch;
  int32_t* order = scratch.get(pairs + p.num_slots + 1);
  make_plan(indices, p.num_tokens, p.num_choices, p.num_slots, order, order + pairs);
  p.plan = {order, order + pairs};
}

void check_ranks(const LoraParams& p) {
  if (!p.ranks) return;
  for (int64_t s = 0; s < p.num_slots; ++s)
    if (p.ranks[s] < 0 || p.ranks[s] > p.r_max)
      throw std::invalid_argument("ranks must lie between 0 and r_max = " + std::to_string(p.r_max) + "; got " +
                                  std::to_string(p.ranks[s]) + " for slot " + std::to_string(s));
}

void check_memory(const LoraParams& p) {
  const int64_t bytes = element_size(p.dtype), columns = columns_of(p), row = p.y_stride * bytes;
  const Extent y = extent_of_y(p);
  if (y.begin == y.end) return;
  if (p.num_tokens > 1 && p.y_stride < columns)
    throw std::invalid_argument("y must give every element its own memory; its rows overlap (row stride " +
                                std::to_string(p.y_stride) + " for " + std::to_string(columns) + " columns)");
  const Extent x = extent_of(p.x, p.num_tokens, p.x_stride, p.d_in, bytes);
  if (p.x && meet(y, x)) {
    const int64_t gap = p.x_stride == p.y_stride ? ((x.begin - y.begin) % row + row) % row : 0;
    if (gap < columns * bytes || gap + p.d_in * bytes > row)
      throw std::invalid_argument("y must not share memory with x; write to another tensor, or clone x");
  }
  for (int s = 0; s < p.num_slices; ++s)
    for (const auto& [weight, name] : {std::pair{&p.A[s], "A"}, std::pair{&p.B[s], "B"}}) {
      const int64_t width = weight == &p.A[s] ? p.d_in : p.r_max;
      if (!weight->data || width == 0 || weight->rows == 0) continue;
      const int64_t last = (p.num_slots - 1) * weight->slot_stride + (weight->rows - 1) * weight->row_stride + width;
      if (meet(y, extent_of(weight->data, 1, 0, last, bytes)))
        throw std::invalid_argument(std::string("y must not share memory with ") + name);
    }
}

void check_router_memory(const RouterParams& r) {
  const LoraParams& p = r.lora;
  const Extent y = extent_of_y(p);
  if (y.begin == y.end || p.r_max == 0) return;
  for (int s = 0; s < p.num_slices; ++s) {
    const Weight &router = r.router_A[s], &core = r.cores[s];
    if (meet(y, extent_of(router.data, r.router_rank, router.row_stride, p.d_in, element_size(p.dtype))))
      throw std::invalid_argument("y must not share memory with router_A");
    const int64_t last = (p.num_slots - 1) * core.slot_stride + (core.rows - 1) * core.row_stride + p.r_max;
    if (meet(y, extent_of(core.data, 1, 0, last, sizeof(float))))
      throw std::invalid_argument("y must not share memory with cores");
  }
}

}  // namespace lorakern::cpu
