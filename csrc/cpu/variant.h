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
  const float* gates;     // (T, K) or null for 1
};

// A range of columns for groups of pairs. Where a token may get several terms the groups ascend by slot and hold all
// pairs of the tokens in the range.
struct ExpandUnit {
  const Pairs* groups;
  int64_t num_groups, token_begin, token_end, column_begin, column_end;
};

// Logits of some pairs of one slot, in the place of their gates.
struct GateUnit {
  int slice;
  Pairs pairs;
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

struct PointsUnit {  // the inner products of all points over some columns of a part, as points_gram leaves them
  const Points* points;
  bool center;  // take the mean of each column away
  int64_t part, begin, end;
  float* out;  // (width, width), of which only what is on or right of the diagonal means anything
};

struct CentersUnit {  // some columns of the centroids of a problem: less their mean, packed, and their squares' sums
  const AssignProblem* problem;
  int64_t begin, end;
  float *packed, *mean;  // (columns, points_stride(k)) and (columns), of all columns
  double* squares;       // (k)
};

struct AssignUnit {  // some points of a problem, and its centroids as CentersUnit leaves them
  const AssignProblem* problem;
  const Rows* parts;
  int64_t begin, count;
  const float *centers, *mean, *squares;

  const float* scales(int64_t part) const {
    const Points& p = problem->points;
    return p.scales ? p.scales + part * p.count + begin : nullptr;
  }
};

struct UpdateUnit {  // some columns of a part, whose first column is column `first` of a point
  const UpdateProblem* problem;
  int64_t part, first, begin, end;
  bool settled;  // every point is a member of the cluster of its label
  double* inertia;
};

struct SeedUnit {
  const SeedProblem* problem;
  int64_t run;
};

struct LloydUnit {
  const LloydProblem* problem;
  int64_t run;
  double least_shift;  // a smaller sum of squared shifts ends it
  int64_t *labels, *members, *iterations;
  double* inertia;
};

struct Variant {
  const char* name;
  int64_t panel_columns;                         // widths of column ranges should be multiples of it
  int64_t tile_ranks;                            // numbers of ranks in a shrink likewise
  int64_t (*shrink_scratch)(const ShrinkUnit&);  // floats
  void (*shrink)(const LoraParams&, const ShrinkUnit&, float* scratch);
  int64_t (*expand_scratch)(const ExpandJob&, const ExpandUnit&);  // floats
  void (*expand)(const ExpandJob&, const ExpandUnit&, float* scratch);
  void (*gate)(const RouterParams&, const GateUnit&);
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
  int64_t (*points_stride)(int64_t count);
  int64_t (*points_scratch)(int64_t count);  // floats
  void (*points_gram)(const PointsUnit&, float* scratch);
  void (*pack_centers)(const CentersUnit&);
  int64_t (*assign_rows)(int64_t k);     // points of a unit
  int64_t (*assign_scratch)(int64_t k);  // floats
  void (*assign)(const AssignUnit&, float* scratch);
  int64_t (*update_scratch)(const UpdateUnit&);  // doubles
  void (*update)(const UpdateUnit&, double* scratch);
  int64_t (*seed_scratch)(const Cloud&);  // doubles
  void (*seed)(const SeedUnit&, double* scratch);
  int64_t (*lloyd_scratch)(const Cloud&);  // doubles
  void (*lloyd)(const LloydUnit&, double* scratch);
};

constexpr int64_t kSumFloats = 1 << 17;  // of float32 sums a thread keeps where tokens get several terms: half of L2

inline int64_t rank_of(const LoraParams& p, int64_t slot) { return p.ranks ? p.ranks[slot] : p.r_max; }

inline int64_t token_of(const LoraParams& p, int64_t pair) { return p.num_choices == 1 ? pair : pair / p.num_choices; }

inline float factor_of(const LoraParams& p, const float* gates, int64_t slot, int64_t pair) {
  return (p.scale ? p.scale[slot] : 1.0f) * (gates ? gates[pair] : 1.0f);
}

}  // namespace lorakern
