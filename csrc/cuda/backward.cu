// The gradients of y[t] = sum over k and slices of f B (A x[t]), f = gates[t, k] * scale[i], i = indices[t, k], from
// h = A x and dy. Five launches:
//   back    dh[p] = B^T dy[t], one block per (64 pairs of a slot, slice, tile of ranks, plane: a part of d_out)
//   finish  one warp per pair: dh = the sum of its planes, dots[p] = h . dh, dgates; leaves f dh and f h as factors
//   scales  dscale[i] = sum of gate * dots over the pairs of a slot
//   inputs  dx[t] = sum over k, slices of A^T (f dh), one block per (32 tokens, tile of columns)
//   outer   dA[i] = sum of (f dh) x^T, dB[i] = sum of dy (f h)^T over the pairs of a slot, one block per tile of them
//
// Every sum has one order: no atomics. That of dx and dgates is set by the shapes of one token alone; those of dA, dB
// and dscale follow the plan. Blocks loop over what does not fit a grid.
#include <initializer_list>

#include "gradients.cuh"
#include "launch.h"

namespace lorakern::cuda {
namespace {

constexpr int64_t kMaxGrid = 2147483647;
// Blocks that keep any device busy: where there are more, each takes several tiles of columns for its tokens.
constexpr int64_t kInputBlocks = 1024;
// More than run at once anywhere, and few enough that the tiles of unused slots cost no block each.
constexpr int64_t kOuterGrid = 4096;

// dh from its planes, dots and dgates of a pair; h and dh become factors of dB, dA and dx.
template <typename T>
__global__ void __launch_bounds__(kThreads) finish(const __grid_constant__ BackwardParams p) {
  const Routing& r = p.routing;
  const int lane = threadIdx.x % kWarp;
  for (int64_t pair = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp; pair < pairs_of(r);
       pair += int64_t{gridDim.x} * kWarps) {
    const int slot = slot_of(r, pair), rank = rank_of(r, slot);
    const float scale = slot < 0 ? 0.0f : scale_of(r, slot), factor = scale * gate_of(r, pair);
    float dot = 0.0f;
    for (int slice = 0; slice < p.num_slices; ++slice) {
      float *h = factors_of(p, p.h, slice, pair), *dh = factors_of(p, p.dh, slice, pair);
      for (int i = lane; i < rank; i += kWarp) {
        float sum = dh[i];
        for (int plane = 1; plane < p.num_planes; ++plane) sum += factors_of(p, p.dh, slice, pair, plane)[i];
        dot = fmaf(h[i], sum, dot);
        h[i] = as_factor<T>(factor * h[i]);
        dh[i] = as_factor<T>(factor * sum);
      }
    }
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) dot += __shfl_xor_sync(0xffffffffu, dot, lanes);
    if (lane == 0) {
      if (!p.first_call) dot += p.dots[pair];
      p.dots[pair] = dot;
      if (p.dgates != nullptr && p.last_call) p.dgates[pair] = scale * dot;
    }
  }
}

// dscale of a slot, in double: terms cancel.
__global__ void __launch_bounds__(kThreads) scales(const __grid_constant__ BackwardParams p) {
  __shared__ double warp_sums[kWarps];
  const Routing& r = p.routing;
  for (int64_t slot = blockIdx.x; slot < r.num_slots; slot += gridDim.x) {
    const int end = start_of(r, slot + 1);
    double sum = 0;
    for (int64_t i = start_of(r, slot) + static_cast<int>(threadIdx.x); i < end; i += kThreads) {
      const int pair = pair_at(r, i);
      sum = fma(static_cast<double>(gate_of(r, pair)), static_cast<double>(p.dots[pair]), sum);
    }
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
    if (threadIdx.x % kWarp == 0) warp_sums[threadIdx.x / kWarp] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int warp = 1; warp < kWarps; ++warp) sum += warp_sums[warp];
      p.dscale[slot] = static_cast<float>(sum);
    }
    __syncthreads();  // before the next round overwrites warp_sums
  }
}

template <typename Kernel, typename... Arguments>
cudaError_t launch(Kernel kernel, int64_t blocks, size_t shared_bytes, cudaStream_t stream,
                   const Arguments&... arguments) {
  if (blocks == 0) return cudaSuccess;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(std::min(blocks, kMaxGrid)));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <typename T, int kRanks>
cudaError_t launch_with_ranks(const BackwardParams& p, cudaStream_t stream) {
  const Routing& r = p.routing;
  int64_t widest = 0;
  for (int slice = 0; slice < p.num_slices; ++slice) widest = std::max(widest, p.B[slice].rows);
  const int64_t rank_tiles = ceil_div(r.r_max, kRanks), pairs = pairs_of(r);
  const int64_t column_tiles = ceil_div(std::max(widest, p.d_in), kOuterColumns);
  const int64_t back_blocks = pairs == 0 ? 0 : rank_tiles * p.num_planes * p.num_slices * num_pair_tiles(r);
  const int64_t outer_blocks = rank_tiles * column_tiles * 2 * p.num_slices * r.num_slots;
  const int64_t token_tiles = ceil_div(r.num_tokens, kTokens), input_tiles = ceil_div(p.d_in, kInputColumns);
  const int64_t width = std::clamp<int64_t>(token_tiles * input_tiles / kInputBlocks, 1, 8);
  const int64_t input_blocks = p.dx == nullptr ? 0 : token_tiles * ceil_div(input_tiles, width);
  const int64_t slots = p.dscale != nullptr && p.last_call ? r.num_slots : 0;
  cudaError_t error = launch(back<T, kRanks>, r.num_slots == 0 ? 0 : back_blocks, sizeof(BackShared<T, kRanks>), stream,
                             p, back_blocks);
  if (!error) error = launch(finish<T>, ceil_div(pairs, kWarps), 0, stream, p);
  if (!error) error = launch(scales, slots, 0, stream, p);
  if (!error) error = launch(inputs<T>, input_blocks, sizeof(InputsShared<T>), stream, p, input_blocks, width);
  if (!error)
    error = launch(outer<T, kRanks>, std::min(outer_blocks, kOuterGrid), sizeof(OuterShared<T, kRanks>), stream, p,
                   outer_blocks, column_tiles);
  return error;
}

template <typename T>
cudaError_t load_of() {
  return load_kernels(back<T, 16>, back<T, 32>, back<T, 64>, finish<T>, inputs<T>, outer<T, 16>, outer<T, 32>,
                      outer<T, 64>);
}

}  // namespace

const char* backward(const BackwardParams& params, int device, void* stream) {
  if (cudaError_t error = cudaSetDevice(device)) return describe(error);
  return describe(with_dtype(params.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto run = params.routing.r_max <= 16   ? launch_with_ranks<T, 16>
                     : params.routing.r_max <= 32 ? launch_with_ranks<T, 32>
                                                  : launch_with_ranks<T, 64>;
    return run(params, static_cast<cudaStream_t>(stream));
  }));
}

cudaError_t load_backward() {
  cudaError_t error = load_kernels(scales);
  for (Dtype dtype : {Dtype::kFloat32, Dtype::kFloat16, Dtype::kBFloat16}) {
    if (!error) error = with_dtype(dtype, [](auto zero) { return load_of<decltype(zero)>(); });
  }
  return error;
}

}  // namespace lorakern::cuda
