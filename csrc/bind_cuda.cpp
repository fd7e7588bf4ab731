// lorakern._cuda: argument passing only. Pointers and streams are integers; sizes and strides count elements.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cuda/params.h"

namespace py = pybind11;
using namespace lorakern;

namespace {

// A pointer comes first, 0 where the argument is absent; bool: are the integers 64-bit?
using Strided = std::tuple<uintptr_t, int64_t>;
using StridedIntegers = std::tuple<uintptr_t, int64_t, bool>;
using Pairs = std::tuple<uintptr_t, int64_t, int64_t>;  // token stride, choice stride
using PairIntegers = std::tuple<uintptr_t, int64_t, int64_t, bool>;
using Weights = std::vector<std::tuple<uintptr_t, int64_t, int64_t, int64_t>>;  // slot stride, row stride, rows
using Plans = std::tuple<uintptr_t, uintptr_t>;                                 // order, starts
// tokens, choices, slots, r_max, d_in
using Sizes = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t>;

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void check(const char* error) {
  if (error) throw std::runtime_error(std::string("lorakern CUDA: ") + error);
}

void fill(Weight* out, const Weights& weights) {
  for (const auto& [data, slot_stride, row_stride, rows] : weights) {
    *out++ = {pointer<const void>(data), slot_stride, row_stride, rows};
  }
}

cuda::Routing routing_of(const Sizes& sizes, const PairIntegers& indices, const Strided& scale,
                         const StridedIntegers& ranks, const Pairs& gates, const Plans& plan) {
  cuda::Routing r = {};
  std::tie(r.num_tokens, r.num_choices, r.num_slots, r.r_max, std::ignore) = sizes;
  r.indices = {pointer<const void>(std::get<0>(indices)), std::get<3>(indices)};
  r.indices_token_stride = std::get<1>(indices);
  r.indices_choice_stride = std::get<2>(indices);
  r.scale = pointer<const float>(std::get<0>(scale));
  r.scale_stride = std::get<1>(scale);
  r.ranks = {pointer<const void>(std::get<0>(ranks)), std::get<2>(ranks)};
  r.ranks_stride = std::get<1>(ranks);
  r.gates = pointer<const float>(std::get<0>(gates));
  r.gates_token_stride = std::get<1>(gates);
  r.gates_choice_stride = std::get<2>(gates);
  r.plan = {pointer<const int32_t>(std::get<0>(plan)), pointer<const int32_t>(std::get<1>(plan))};
  return r;
}

// What the params of bgmv and of backward have in common.
template <typename Params>
Params params_of(int dtype, const Sizes& sizes, const Strided& x, const Weights& A, const Weights& B,
                 const cuda::Routing& routing) {
  if (A.size() != B.size() || A.size() > size_t{kMaxSlices}) throw std::invalid_argument("A, B: slices");
  Params p = {};
  p.dtype = static_cast<Dtype>(dtype);
  p.routing = routing;
  p.d_in = std::get<4>(sizes);
  p.num_slices = static_cast<int>(A.size());
  p.x = pointer<const void>(std::get<0>(x));
  p.x_stride = std::get<1>(x);
  fill(p.A, A);
  fill(p.B, B);
  return p;
}

void bgmv(int device, uintptr_t stream, int dtype, const Sizes& sizes, const Strided& y, const Strided& x,
          const Weights& A, const Weights& B, uintptr_t h, const PairIntegers& indices, const Strided& scale,
          const StridedIntegers& ranks, const Pairs& gates, const Plans& plan, int num_planes, bool accumulate) {
  auto p = params_of<cuda::BgmvParams>(dtype, sizes, x, A, B, routing_of(sizes, indices, scale, ranks, gates, plan));
  p.y = pointer<void>(std::get<0>(y));
  p.y_stride = std::get<1>(y);
  p.h = pointer<float>(h);
  p.num_planes = num_planes;
  p.accumulate = accumulate;
  check(cuda::bgmv(p, device, pointer<void>(stream)));
}

void backward(int device, uintptr_t stream, int dtype, const Sizes& sizes, const Strided& dy, const Strided& x,
              const Weights& A, const Weights& B, uintptr_t h, uintptr_t dh, int num_planes, uintptr_t dots,
              uintptr_t dx_sum, uintptr_t dx, const std::vector<uintptr_t>& dA, const std::vector<uintptr_t>& dB,
              uintptr_t dscale, uintptr_t dgates, const PairIntegers& indices, const Strided& scale,
              const StridedIntegers& ranks, const Pairs& gates, const Plans& plan, bool first_call, bool last_call) {
  if (dA.size() != A.size() || dB.size() != B.size()) throw std::invalid_argument("dA, dB: slices");
  auto p =
      params_of<cuda::BackwardParams>(dtype, sizes, x, A, B, routing_of(sizes, indices, scale, ranks, gates, plan));
  p.dy = pointer<const void>(std::get<0>(dy));
  p.dy_stride = std::get<1>(dy);
  p.h = pointer<float>(h);
  p.dh = pointer<float>(dh);
  p.num_planes = num_planes;
  p.dots = pointer<float>(dots);
  p.dx_sum = pointer<float>(dx_sum);
  p.dx = pointer<void>(dx);
  for (size_t slice = 0; slice < A.size(); ++slice) {
    p.dA[slice] = pointer<void>(dA[slice]);
    p.dB[slice] = pointer<void>(dB[slice]);
  }
  p.dscale = pointer<float>(dscale);
  p.dgates = pointer<float>(dgates);
  p.first_call = first_call;
  p.last_call = last_call;
  check(cuda::backward(p, device, pointer<void>(stream)));
}

void plan(int device, uintptr_t stream, const Sizes& sizes, const PairIntegers& indices, uintptr_t order,
          uintptr_t starts) {
  const cuda::Routing routing = routing_of(sizes, indices, {}, {}, {}, {});
  check(cuda::plan(routing, pointer<int32_t>(order), pointer<int32_t>(starts), device, pointer<void>(stream)));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.attr("MAX_SLICES") = kMaxSlices;
  m.def("bgmv", &bgmv, py::kw_only(), py::arg("device"), py::arg("stream"), py::arg("dtype"), py::arg("sizes"),
        py::arg("y"), py::arg("x"), py::arg("A"), py::arg("B"), py::arg("h"), py::arg("indices"), py::arg("scale"),
        py::arg("ranks"), py::arg("gates"), py::arg("plan"), py::arg("num_planes"), py::arg("accumulate"),
        py::call_guard<py::gil_scoped_release>());
  m.def("backward", &backward, py::kw_only(), py::arg("device"), py::arg("stream"), py::arg("dtype"), py::arg("sizes"),
        py::arg("dy"), py::arg("x"), py::arg("A"), py::arg("B"), py::arg("h"), py::arg("dh"), py::arg("num_planes"),
        py::arg("dots"), py::arg("dx_sum"), py::arg("dx"), py::arg("dA"), py::arg("dB"), py::arg("dscale"),
        py::arg("dgates"), py::arg("indices"), py::arg("scale"), py::arg("ranks"), py::arg("gates"), py::arg("plan"),
        py::arg("first_call"), py::arg("last_call"), py::call_guard<py::gil_scoped_release>());
  m.def("plan", &plan, py::kw_only(), py::arg("device"), py::arg("stream"), py::arg("sizes"), py::arg("indices"),
        py::arg("order"), py::arg("starts"), py::call_guard<py::gil_scoped_release>());
  m.def(
      "preload", [](int device) { check(cuda::preload(device)); }, py::arg("device"),
      py::call_guard<py::gil_scoped_release>());
  m.def("problem", [] { return cuda::problem(); });
}
