// Scheduling: the plan, the split of each op into units of work for the threads, scratch. No arithmetic of its own but
// the gradients of scale and gates. How work is split never changes a result: every output is summed by one unit.
#include "lora.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>

#include "threads.h"
#include "variant.h"

namespace lorakern::cpu {

const Variant& variant_for(Dtype dtype);

namespace {

// A buffer that a thread keeps from call to call, aligned to a cache line.
template <typename T>
class Scratch {
 public:
  T* get(int64_t count) {
    if (count > capacity_) {
      void* memory = std::aligned_alloc(64, (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64);
      if (!memory) throw std::bad_alloc();
      data_.reset(static_cast<T*>(memory));
      capacity_ = count;
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> data_;
  int64_t capacity_ = 0;
};

thread_local Scratch<int32_t> plan_scratch;
thread_local Scratch<uint8_t> served_scratch;
thread_local Scratch<float> h_scratch, dh_scratch, unit_scratch;

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
  int32_t* order = plan_scratch.get(pairs + p.num_slots + 1);
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

struct Extent {  // bytes
  const char *begin, *end;
};

Extent extent_of(const void* data, int64_t rows, int64_t stride, int64_t columns, int64_t bytes) {
  const char* begin = static_cast<const char*>(data);
  if (rows == 0 || columns == 0) return {begin, begin};
  return {begin, begin + ((rows - 1) * stride + columns) * bytes};
}

bool meet(Extent a, Extent b) { return a.begin < b.end && b.begin < a.end; }

size_t element_size(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

int64_t columns_of(const LoraParams& p) {
  int64_t columns = 0;
  for (int s = 0; s < p.num_slices; ++s) columns += p.B[s].rows;
  return columns;
}

// y is written while x and the weights are read: they must not share memory, but for columns of one wide matrix.
void check_memory(const LoraParams& p) {
  const int64_t bytes = element_size(p.dtype), columns = columns_of(p), row = p.y_stride * bytes;
  const Extent y = extent_of(p.y, p.num_tokens, p.y_stride, columns, bytes);
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

// Fewer threads for little work: waking one costs about as much as this many multiply-adds.
int threads_for(const LoraParams& p, int64_t width, int threads) {
  constexpr int64_t kWorthAThread = 1 << 17;
  const int64_t work = p.num_tokens * p.num_choices * p.r_max * width;
  return static_cast<int>(std::min<int64_t>(threads, work / kWorthAThread + 1));
}

// Tokens per unit of work: few enough to share one slot's tokens between threads, enough to reuse its weights.
constexpr int64_t kUnitTokens = 64;

template <typename Visit>
void for_each_group(const LoraParams& p, const Visit& visit) {
  for (int64_t slot = 0; slot < p.num_slots; ++slot) {
    const int64_t first = p.plan.starts[slot], last = p.plan.starts[slot + 1], rank = rank_of(p, slot);
    for (int64_t i = first; i < last && rank > 0; i += kUnitTokens)
      visit(slot, rank, i, std::min(i + kUnitTokens, last));
  }
}

void run_shrink(const LoraParams& p, const Variant& variant, int threads) {
  static thread_local std::vector<ShrinkUnit> units;
  units.clear();
  threads = threads_for(p, p.d_in, threads);
  const int64_t rows = threads > 1 ? 8 : p.r_max;
  for_each_group(p, [&](int64_t slot, int64_t rank, int64_t first, int64_t last) {
    for (int s = 0; s < p.num_slices; ++s)
      for (int64_t row = 0; row < rank; row += rows)
        units.push_back({s, slot, first, last, row, std::min(row + rows, rank)});
  });
  const std::vector<ShrinkUnit>& shared = units;  // thread_local: the workers must not look up their own
  parallel_for(threads, static_cast<int64_t>(units.size()), [&](int64_t i) { variant.shrink(p, shared[i]); });
}

// Split the output into units, a few for each thread: ranges of columns that are multiples of a panel. Where a token
// gets one term, slots are units of their own, and one with few tokens is not split: its weights are then one long
// stream.
void run_expand(const ExpandJob& job, const Variant& variant, int64_t columns, int threads) {
  constexpr int64_t kMostColumns = 1024, kFewTokens = 8;
  static thread_local std::vector<ExpandUnit> units;
  units.clear();
  const LoraParams& p = *job.params;
  threads = threads_for(p, columns, threads);
  int64_t width = std::min(kMostColumns, (columns + 4 * threads - 1) / (4 * threads));
  width = (width + variant.panel_columns - 1) / variant.panel_columns * variant.panel_columns;
  const auto split = [&](int64_t slot_begin, int64_t slot_end, int64_t step) {
    for (int64_t begin = 0; begin < columns; begin += step)
      units.push_back({slot_begin, slot_end, begin, std::min(begin + step, columns)});
  };
  int64_t widest = width;
  if (p.num_choices * job.num_weights == 1) {
    int64_t active = 0;
    for (int64_t slot = 0; slot < p.num_slots; ++slot) active += p.plan.starts[slot] < p.plan.starts[slot + 1];
    for (int64_t slot = 0; slot < p.num_slots; ++slot) {
      const int64_t tokens = p.plan.starts[slot + 1] - p.plan.starts[slot];
      if (tokens == 0) continue;
      const bool whole = active >= 4 * threads && tokens <= kFewTokens;
      split(slot, slot + 1, whole ? columns : width);
      if (whole) widest = columns;
    }
  } else {
    split(0, p.num_slots, width);
  }
  const std::vector<ExpandUnit>& shared = units;  // thread_local: the workers must not look up their own
  parallel_for(threads, static_cast<int64_t>(units.size()), [&](int64_t i) {
    variant.expand(job, shared[i], unit_scratch.get(variant.expand_scratch(job, widest)));
  });
}

const uint8_t* served_tokens(const LoraParams& p) {
  uint8_t* served = served_scratch.get(p.num_tokens);
  std::fill(served, served + p.num_tokens, 0);
  for (int64_t slot = 0; slot < p.num_slots; ++slot)
    if (rank_of(p, slot) > 0)
      for (int64_t i = p.plan.starts[slot]; i < p.plan.starts[slot + 1]; ++i)
        served[p.plan.order[i] / p.num_choices] = 1;
  return served;
}

void run_expands(const LoraParams& p, const Variant& variant, int threads) {
  const uint8_t* served = p.num_choices > 1 ? served_tokens(p) : nullptr;
  char* y = static_cast<char*>(p.y);
  for (int s = 0; s < p.num_slices; ++s) {
    ExpandJob job{
        &p,           &p.B[s], {p.h + s * p.num_tokens * p.num_choices * p.r_max}, 1, true, true, y, p.y_stride,
        p.accumulate, served};
    run_expand(job, variant, p.B[s].rows, threads);
    y += p.B[s].rows * element_size(p.dtype);
  }
}

int64_t h_size(const LoraParams& p) { return p.num_slices * p.num_tokens * p.num_choices * p.r_max; }

// dscale, dgates, and the factors into h and dh. Sums run over pairs in the order of the plan, in double: their terms
// have either sign and cancel.
void apply_factors(const LoraGradParams& g) {
  const LoraParams& p = g.forward;
  const int64_t pairs = p.num_tokens * p.num_choices;
  for (int64_t slot = 0; slot < p.num_slots; ++slot) {
    const int64_t rank = rank_of(p, slot);
    double dscale = 0;
    for (int64_t i = p.plan.starts[slot]; i < p.plan.starts[slot + 1]; ++i) {
      const int64_t pair = p.plan.order[i];
      const float factor = factor_of(p, slot, pair);
      double dot = 0;
      for (int s = 0; s < p.num_slices; ++s) {
        float *h = p.h + (s * pairs + pair) * p.r_max, *dh = g.dh + (s * pairs + pair) * p.r_max;
        for (int64_t r = 0; r < rank; ++r) {
          dot += static_cast<double>(h[r]) * dh[r];
          h[r] *= factor;
          dh[r] *= factor;
        }
      }
      dscale += dot * (p.gates ? p.gates[pair] : 1.0f);
      if (g.dgates) g.dgates[pair] = static_cast<float>(dot * (p.scale ? p.scale[slot] : 1.0f));
    }
    if (g.dscale) g.dscale[slot] = static_cast<float>(dscale);
  }
}

void run_outer(const OuterJob& job, const Variant& variant, int threads) {
  const LoraParams& p = *job.params;
  constexpr int64_t kColumns = 512;
  const int64_t ranges = (job.columns + kColumns - 1) / kColumns;
  parallel_for(threads_for(p, job.columns, threads), p.num_slots * ranges, [&](int64_t i) {
    const int64_t slot = i / ranges, begin = i % ranges * kColumns, end = std::min(begin + kColumns, job.columns);
    if (p.plan.starts[slot] < p.plan.starts[slot + 1] && rank_of(p, slot) > 0)
      variant.outer(job, slot, begin, end, unit_scratch.get(variant.outer_scratch(p)));
  });
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

void shrink(LoraParams p, const Indices& indices, int threads) {
  check_ranks(p);
  complete_plan(p, indices);
  std::memset(p.h, 0, h_size(p) * sizeof(float));
  run_shrink(p, variant_for(p.dtype), threads);
}

void expand(LoraParams p, const Indices& indices, int threads) {
  check_ranks(p);
  check_memory(p);
  complete_plan(p, indices);
  run_expands(p, variant_for(p.dtype), threads);
}

void bgmv(LoraParams p, const Indices& indices, int threads) {
  check_ranks(p);
  check_memory(p);
  complete_plan(p, indices);
  p.h = h_scratch.get(h_size(p));
  const Variant& variant = variant_for(p.dtype);
  run_shrink(p, variant, threads);
  run_expands(p, variant, threads);
}

void backward(LoraGradParams g, const Indices& indices, int threads) {
  LoraParams& p = g.forward;
  check_ranks(p);
  complete_plan(p, indices);
  const Variant& variant = variant_for(p.dtype);
  p.h = h_scratch.get(h_size(p));
  g.dh = dh_scratch.get(h_size(p));
  run_shrink(p, variant, threads);
  std::vector<BackUnit> units;
  for_each_group(p, [&](int64_t slot, int64_t, int64_t first, int64_t last) {
    for (int s = 0; s < p.num_slices; ++s) units.push_back({s, slot, first, last});
  });
  parallel_for(threads_for(p, columns_of(p), threads), static_cast<int64_t>(units.size()),
               [&](int64_t i) { variant.back(g, units[i], unit_scratch.get(variant.back_scratch(p))); });
  apply_factors(g);
  if (g.dx) {
    ExpandJob job{&p, p.A, {}, p.num_slices, false, false, g.dx, p.d_in, false, served_tokens(p)};
    for (int s = 0; s < p.num_slices; ++s) job.left[s] = g.dh + s * p.num_tokens * p.num_choices * p.r_max;
    run_expand(job, variant, p.d_in, threads);
  }
  const char* dy = static_cast<const char*>(g.dy);
  for (int s = 0; s < p.num_slices; ++s) {
    const int64_t offset = s * p.num_tokens * p.num_choices * p.r_max;
    if (g.dA[s]) run_outer({&p, g.dh + offset, p.x, p.x_stride, g.dA[s], p.d_in, false}, variant, threads);
    if (g.dB[s]) run_outer({&p, p.h + offset, dy, g.dy_stride, g.dB[s], p.B[s].rows, true}, variant, threads);
    dy += p.B[s].rows * element_size(p.dtype);
  }
}

}  // namespace lorakern::cpu
