// What one ISA variant offers to the scheduler in lora.cpp: units of work, each for one thread.
#pragma once
#include "../lorakern.h"

namespace lorakern {

// Some pairs of one slot, in ascending order.
struct Pairs {
  int64_t slot;
  const int32_t* ids;
  int64_t count;
};

// Some pairs against some rows of A:  h[pair][row] = A[row] . x[token].
struct ShrinkUnit {
  int slice;
  Pairs pairs;
  int64_t row_begin, row_end;
};

// out[t][column] (+)= sum over weights w and pairs of t of factor * left_w[pair] . weight_w[slot], for some columns.
struct ExpandJob {
  const LoraParams* params;
  const Weight* weights;          // B: rows are output columns; A: rows are ranks
  const float* left[kMaxSlices];  // (T * K, r_max) per weight
  int num_weights;
  bool by_columns;   // weight rows run along the rank (B), or along the output (A)
  bool use_factors;  // multiply by scale and gate
  void* out;
  int64_t out_stride;
  bool accumulate;
  const uint8_t* served;  // (T): has the token an adapter? Null where every token gets one term at most
};

// A range of columns for groups of pairs. Where a token may get several terms the groups ascend by slot and hold all
// pairs of the tokens in the range.
struct ExpandUnit {
  const Pairs* groups;
  int64_t num_groups, token_begin, token_end, column_begin, column_end;
};

// dh[pair][r] = sum_o dy[t][o] * B[slot][o][r].
struct BackUnit {
  int slice;
  Pairs pairs;
};

// grad[slot] = left^T right over the pairs of a slot, for some columns of `right`.
struct OuterJob {
  const LoraParams* params;
  const float* left;  // (T * K, r_max), factors applied
  const void* right;  // (T, columns)
  int64_t right_stride;
  void* grad;  // (slots, r_max, columns), or (slots, columns, r_max) if transposed
  int64_t columns;
  bool transposed;
};

// Units over some columns of a problem. They write, in doubles: (width, width) of a Gram matrix, of which only what is
// on or right of the diagonal means anything; (kProbes, width) products and (width) norms; the numbers of lines. Those
// of a combination write their part of Y.
template <typename Problem>
struct ColumnUnit {
  const Problem* problem;
  int64_t begin, end;
  double* out;
};

struct Variant {
  const char* name;
  int64_t panel_columns;                         // widths of column ranges should be multiples of it
  int64_t tile_ranks;                            // numbers of ranks in a shrink likewise
  int64_t (*shrink_scratch)(const ShrinkUnit&);  // floats
  void (*shrink)(const LoraParams&, const ShrinkUnit&, float* scratch);
  int64_t (*expand_scratch)(const ExpandJob&, const ExpandUnit&);  // floats
  void (*expand)(const ExpandJob&, const ExpandUnit&, float* scratch);
  int64_t (*back_scratch)();
  void (*back)(const LoraGradParams&, const BackUnit&, float* scratch);
  int64_t (*outer_scratch)(const LoraParams&, int64_t columns);
  void (*outer)(const OuterJob&, int64_t slot, int64_t column_begin, int64_t column_end, float* scratch);
  int64_t (*packed_width)(int64_t rows);
  int64_t (*packed_scratch)(int64_t rows, int64_t results);  // doubles; results are the rows of Y of a combination
  void (*gram)(const ColumnUnit<GramProblem>&, double* scratch);
  void (*sketch)(const ColumnUnit<SketchProblem>&, double* scratch);
  void (*lines)(const ColumnUnit<LinesProblem>&, double* scratch);
  void (*combine)(const ColumnUnit<CombineProblem>&, double* scratch);
};

constexpr int64_t kSumFloats = 1 << 17;  // of float32 sums a thread keeps where tokens get several terms: half of L2

inline int64_t rank_of(const LoraParams& p, int64_t slot) { return p.ranks ? p.ranks[slot] : p.r_max; }

inline int64_t token_of(const LoraParams& p, int64_t pair) { return p.num_choices == 1 ? pair : pair / p.num_choices; }

inline float factor_of(const LoraParams& p, int64_t slot, int64_t pair) {
  return (p.scale ? p.scale[slot] : 1.0f) * (p.gates ? p.gates[pair] : 1.0f);
}

}  // namespace lorakern
