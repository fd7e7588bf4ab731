// The params structs of every kernel, and the conventions they obey. Read this page first.
//
// Names      slot: a place that holds one adapter. token t: a row of x and y. pair p = t * K + k: the k-th adapter of
//            token t. slice: one of several projections that share x and fill y side by side (q, k, v). rank: the true
//            rank of a slot; r_max: the rank the weights are allocated for; what lies beyond the rank is never read.
// Shapes     A (slots, r_max, d_in) and B (slots, d_out, r_max) per slice, innermost stride 1, other strides free
//            (0 included); packed, B's rows of slot i lie at ranks[i] from each other instead. x (T, d_in) and y (T,
//            ...) with innermost stride 1. h (slices, T * K, r_max) contiguous. Strides and sizes count elements, not
//            bytes, and are 64-bit.
// Plan       order (T * K): pair ids sorted stably by slot, pairs without an adapter last. starts (slots + 1): the
//            pairs of slot i are order[starts[i]] .. order[starts[i + 1] - 1].
// Numbers    16-bit or 32-bit floats in and out, every sum in float32 in an order that depends on nothing but the
//            shapes of one token's own computation: a token gives the same bits alone and in any batch. Where the
//            hardware multiplies bfloat16 as it is, h (and dh) is rounded to bfloat16 once, as a factor.
// Ownership  the caller owns every pointer; a kernel keeps none of them after it returns.
#pragma once
#include <cstdint>

namespace lorakern {

// float64: rows of a Gram matrix only.
enum class Dtype : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kFloat64 = 3 };

constexpr int kMaxSlices = 8;

struct Weight {  // one slice of A or of B over all slots
  const void* data;
  int64_t slot_stride;
  int64_t row_stride;
  int64_t rows;  // r_max for A, d_out for B
};

struct Plan {
  const int32_t* order;   // (T * K)
  const int32_t* starts;  // (num_slots + 1)
};

struct LoraParams {
  Dtype dtype;  // of x, A, B and y
  int64_t num_tokens, num_choices, num_slots, r_max, d_in;
  int num_slices;
  const void* x;
  int64_t x_stride;
  Weight A[kMaxSlices];
  Weight B[kMaxSlices];
  void* y;  // at the first column to fill
  int64_t y_stride;
  float* h;
  const float* scale;    // (slots) or null for 1
  const int32_t* ranks;  // (slots) or null for r_max
  const float* gates;    // (T, K) contiguous or null for 1
  Plan plan;
  bool accumulate;  // y += or y =, for tokens that have an adapter
  bool packed;      // B is
};

struct RowSet {  // some rows of X: element (row, column) lies at data + row * row_stride + column * column_stride
  const void* data;
  Dtype dtype;
  int64_t rows, row_stride, column_stride;
};

struct Rows {  // X: the rows of all sets, one below the other
  const RowSet* sets;
  int64_t num_sets, rows, columns;
};

struct GramProblem {  // out = X X^T in float64
  Rows x;
  double* out;  // (rows, rows)
};

struct CombineProblem {  // Y = M X, summed in float64 and rounded once to the dtype of Y
  Rows x;
  const double* factors;  // M (y.rows, x.rows)
  RowSet y;               // its data is written
};

constexpr int kProbes = 8;

struct SketchProblem {  // products = X probes^T and norms[r] = ||X_r||^2, in float64
  Rows x;
  const double* probes;  // (columns, kProbes)
  double* out;           // (rows, kProbes + 1): products, then the norm
};

// The lines of a matrix L = sum over rows r of X_r products_r^T, that is (columns, kProbes), and of its part from the
// first `first` rows. Beside them, outliers: where row first + r of X should be ratios[r] times row r, the elements
// that are off by more than a quarter and by more than `step`. A ratio of NaN looks for none.
struct LinesProblem {
  Rows x;
  const double* products;  // (rows, kProbes)
  int64_t first;
  const double* factors;  // (rows), from row `first` on: line k may have the square allowed + sum_r factors[r] X_rk^2
  double allowed;
  const double* ratios;  // (first), or null: then there may be more or fewer rows than first after row `first`
  double step;
  double* out;  // (kLineNumbers)
};

// ||L||^2 / kProbes, the same of the part, largest square of a line over what it may have, that line, outliers, and
// column * first + r of the first of them.
constexpr int kLineNumbers = 6;

struct LoraGradParams {  // gradients of y = delta(x): any output may be null
  LoraParams forward;    // h holds A x; y is unused
  const void* dy;        // (T, sum of d_out), innermost stride 1
  int64_t dy_stride;
  float* dh;             // (slices, T * K, r_max): scratch
  void* dx;              // (T, d_in) contiguous
  void* dA[kMaxSlices];  // (slots, r_max, d_in) contiguous
  void* dB[kMaxSlices];  // (slots, d_out, r_max) contiguous
  float* dscale;         // (slots), zeroed by the caller
  float* dgates;         // (T, K) contiguous, zeroed by the caller
};

}  // namespace lorakern
