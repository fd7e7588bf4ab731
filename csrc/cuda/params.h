// What the CUDA kernels take beyond lorakern.h, and their host entry points. No CUDA header is needed to include this.
#pragma once
#include "../lorakern.h"

namespace lorakern::cuda {

struct IntArray {  // int32 or int64, as the caller has it: converting would cost a launch
  const void* data;
  bool wide;  // int64
};

constexpr int kUnplannedPairs = 128;  // up to this many a kernel groups by itself

struct Routing {  // which adapter serves which pair, and how strongly
  int64_t num_tokens, num_choices, num_slots, r_max;
  IntArray indices;  // (T, K); outside 0 .. num_slots - 1: no adapter
  int64_t indices_token_stride, indices_choice_stride;
  const float* scale;  // (slots) or null for 1
  int64_t scale_stride;
  IntArray ranks;  // (slots), clamped to 0 .. r_max; data is null for r_max
  int64_t ranks_stride;
  const float* gates;  // (T, K) or null for 1
  int64_t gates_token_stride, gates_choice_stride;
  // A plan of these indices, or null where no kernel of the call needs one. A kernel reads order only between starts,
  // and clamps what it finds there: a plan of other indices gives wrong sums, never an access outside of the arrays.
  Plan plan;
};

struct BgmvParams {  // x null: expand alone, from h. y null: shrink alone, into h
  Dtype dtype;       // of x, A, B and y
  Routing routing;
  int64_t d_in;
  int num_slices;
  const void* x;
  int64_t x_stride;
  Weight A[kMaxSlices];
  Weight B[kMaxSlices];
  void* y;  // at the first column to fill
  int64_t y_stride;
  float* h;  // (num_planes, slices, T * K, r_max): the planes add up to A x; null where num_planes is 0
  int num_planes;
  bool accumulate;  // y += or y =, for tokens that have an adapter
};

struct BackwardParams {  // gradients of y = delta(x); the routing has a plan. Outputs are contiguous; any may be null
  Dtype dtype;
  Routing routing;
  int64_t d_in;
  int num_slices;  // of this call: more than kMaxSlices come in several calls, the first and the last marked as such
  bool first_call, last_call;
  const void* x;
  int64_t x_stride;
  const void* dy;  // at the first column of the call's slices
  int64_t dy_stride;
  Weight A[kMaxSlices];
  Weight B[kMaxSlices];
  float* h;              // (slices, T * K, r_max): A x, one plane; comes back times scale and gate
  float* dh;             // (planes, slices, T * K, r_max): scratch; the sum over d_out in B^T dy is cut into planes
  int num_planes;        // by the shapes of the weights alone, never by T
  float* dots;           // (T * K): scratch that the calls share
  float* dx_sum;         // (T, d_in): the same; null where there is one call
  void* dx;              // (T, d_in): written by the last call, as are dscale and dgates
  void* dA[kMaxSlices];  // (slots, r_max, d_in)
  void* dB[kMaxSlices];  // (slots, d_out, r_max)
  float* dscale;         // (slots)
  float* dgates;         // (T, K)
};

// Each returns null, or what CUDA has to say against it (a string that lives forever). `stream` is a cudaStream_t.
// Those that take a device make it current in the calling thread and leave it so. This library links its own copy of
// the CUDA runtime: whoever uses another one restores the device there.
const char* bgmv(const BgmvParams& params, int device, void* stream);
const char* planes(const BgmvParams& params, int device, int* count);  // of h that bgmv needs; pointers do not matter
const char* backward(const BackwardParams& params, int device, void* stream);
const char* plan(const Routing& routing, int32_t* order, int32_t* starts, int device, void* stream);
const char* preload(int device);  // loads every kernel now: the first launch may be inside a graph capture
const char* problem();            // why no kernel can run here (the driver, the devices), without creating a context

}  // namespace lorakern::cuda
