// What the CUDA kernels take beyond lorakern.h, and their host entry points. No CUDA header is needed to include this.
//
// The CUDA bgmv follows `indices` token by token instead of a plan: a block that knows its token needs no search, and a
// plan that does not fit the indices can then never send a kernel outside its arrays.
#pragma once
#include "../lorakern.h"

namespace lorakern::cuda {

struct IntArray {  // int32 or int64, as the caller has it: converting would cost a launch
  const void* data;
  bool wide;  // int64
};

struct BgmvParams {
  Dtype dtype;  // of x, A, B and y
  int64_t num_tokens, num_choices, num_slots, r_max, d_in;
  int num_slices;
  const void* x;
  int64_t x_stride;
  Weight A[kMaxSlices];
  Weight B[kMaxSlices];
  void* y;  // at the first column to fill
  int64_t y_stride;
  float* h;          // scratch, (slices, T * K, r_max)
  IntArray indices;  // (T, K); outside 0 .. num_slots - 1: no adapter
  int64_t indices_token_stride, indices_choice_stride;
  const float* scale;  // (slots) or null for 1
  int64_t scale_stride;
  IntArray ranks;  // (slots), clamped to 0 .. r_max; data is null for r_max
  int64_t ranks_stride;
  const float* gates;  // (T, K) or null for 1
  int64_t gates_token_stride, gates_choice_stride;
  bool accumulate;  // y += or y =, for tokens that have an adapter
};

// Each returns null, or what CUDA has to say against it (a string that lives forever). `stream` is a cudaStream_t.
// bgmv and preload make `device` current in the calling thread and leave it so. This library links its own copy of the
// CUDA runtime: whoever uses another one restores the device there.
const char* bgmv(const BgmvParams& params, int device, void* stream);
const char* preload(int device);  // loads every kernel now: the first launch may be inside a graph capture
const char* problem();            // why no kernel can run here (the driver, the devices), without creating a context

}  // namespace lorakern::cuda
