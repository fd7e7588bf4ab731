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
  int64_t gates_stride;  // from slice to slice; 0 where they share their gates
  Plan plan;
  bool accumulate;  // y += or y =, for tokens that have an adapter
  bool packed;      // B is
};

struct RouterParams {  // gates[s][t] = softmax over k of (router_A[s] x[t])^T cores[s][slot] h[s][t, k] / sqrt(router
                       // rank)
  LoraParams lora;     // of which the gates are made from x, h, ranks and plan
  int64_t router_rank;
  Weight router_A[kMaxSlices];  // (router rank, d_in) of x's dtype: the only slot
  Weight cores[kMaxSlices];     // (slots, router rank, r_max) of float32
  float* query;                 // (slices, T, router rank): scratch
  float* gates;                 // (slices, T, K), 0 without an adapter
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

struct Points {  // `count` points. Their columns are those of all parts, side by side; each part has a row to a point
  const Rows* parts;
  int64_t num_parts, count, columns;
  const float* scales;  // (num_parts, count), factors of the rows, or null for 1
};

struct PointsGramProblem {  // out = X X^T in float32, X the points or, where their mean is large, what is left of it
  Points points;
  float* out;  // (count, count)
};

struct AssignProblem {  // distances of points to k centroids: all of them, or the nearest centroid and its distance
  Points points;
  const float* centroids;  // (k, columns)
  int64_t k;
  int64_t* labels;   // (count) or null; the lower of equally near centroids
  float* sqdist;     // (count) or null
  float* distances;  // (count, k) or null
};

struct UpdateProblem {  // centroids[c] = sum w_i x_i / counts[c], counts[c] = sum w_i, over the members i of c
  Points points;
  const int64_t* members;  // (count)
  const int64_t* labels;   // (count) or null: then there is no inertia
  const double* weights;   // (count)
  int64_t k;
  float* centroids;  // (k, columns); zero where a cluster has no weight
  double* counts;    // (k)
  double* inertia;   // sum w_i ||x_i - centroids[labels[i]]||^2, of centroids that are not rounded
};

struct Cloud {            // weighted points of which their inner products are known, and how many clusters are wanted
  const float* gram;      // (count, count)
  const double* weights;  // (count)
  int64_t count, k;
};

struct SeedProblem {  // greedy k-means++: k points of the cloud for every run
  Cloud cloud;
  const double* uniforms;  // `stride` from run to run, of which the first 1 + (k - 1) * trials are drawn
  int64_t runs, trials, stride;
  int64_t* seeds;  // (runs, k)
};

struct LloydProblem {  // Lloyd's iterations from every run's seeds, or from labels; the run of least inertia is kept
  Cloud cloud;
  const int64_t* seeds;  // (runs, k), or null: then one run starts from these labels, whose centroids are anywhere
  int64_t runs;
  const int64_t* first_labels;  // (count)
  const double* first_sqdist;   // (count), to those centroids
  int64_t max_iterations;
  double tolerance;  // stop where the sum of all squared shifts is this share of the variance summed over columns
  int64_t* labels;   // (count)
  int64_t* members;  // (count): the clusters of whose points the centroids are the means
  int64_t* iterations;
};

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
