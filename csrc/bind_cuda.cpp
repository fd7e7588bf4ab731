// lorakern._cuda: argument passing only. Pointers and streams are integers; sizes and strides count elements.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cuda/params.h"

namespace py = pybind11;
using namespace lorakern;

namespace {

// A pointer comes first, 0 where the argument is absent; bool: are the integers 64-bit?
using Address = uintptr_t;
using Strided = std::tuple<Address, int64_t>;
using Weights = std::vector<std::tuple<Address, int64_t, int64_t, int64_t>>;  // slot stride, row stride, rows
using Sizes = std::tuple<int64_t, int64_t, int64_t, int64_t>;                 // tokens, choices, slots, r_max
using Indices = std::tuple<Address, int64_t, int64_t, bool>;                  // token stride, choice stride
using Ranks = std::tuple<Address, int64_t, bool>;
using Gates = std::tuple<Address, int64_t, int64_t>;                                     // token stride, choice stride
using PlanArrays = std::tuple<Address, Address>;                                         // order, starts
using RoutingArguments = std::tuple<Sizes, Indices, Strided, Ranks, Gates, PlanArrays>;  // third: scale

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

void check(const char* error) {
  if (error) throw std::runtime_error(std::string("lorakern CUDA: ") + error);
}

void fill(Weight* out, const Weights& weights) {
  if (weights.size() > size_t{kMaxSlices}) throw std::invalid_argument("too many slices");
  for (const auto& [data, slot_stride, row_stride, rows] : weights) {
    *out++ = {pointer<const void>(data), slot_stride, row_stride, rows};
  }
}

cuda::Routing routing_of(const RoutingArguments& arguments) {
  const auto& [sizes, indices, scale, ranks, gates, plan] = arguments;
  cuda::Routing r = {};
  std::tie(r.num_tokens, r.num_choices, r.num_slots, r.r_max) = sizes;
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

// Of x and A alone (shrink), of y and B alone (expand), or of all (bgmv).
void bgmv(int device, Address stream, int dtype, const RoutingArguments& routing, int64_t d_in, const Strided& x,
          const Weights& A, const Strided& y, const Weights& B, Address h, int num_planes, bool accumulate) {
  cuda::BgmvParams p = {};
  p.dtype = static_cast<Dtype>(dtype);
  p.routing = routing_of(routing);
  p.d_in = d_in;
  p.num_slices = static_cast<int>(std::max(A.size(), B.size()));
  fill(p.A, A);
  fill(p.B, B);
  p.x = pointer<const void>(std::get<0>(x));
  p.x_stride = std::get<1>(x);
  p.y = pointer<void>(std::get<0>(y));
  p.y_stride = std::get<1>(y);
  p.h = pointer<float>(h);
  p.num_planes = num_planes;
  p.accumulate = accumulate;
  check(cuda::bgmv(p, device, pointer<void>(stream)));
}

// Planes of h that bgmv of all needs.
int planes(int device, int dtype, const Sizes& sizes, int64_t d_in, int num_slices) {
  cuda::BgmvParams p = {};
  p.dtype = static_cast<Dtype>(dtype);
  std::tie(p.routing.num_tokens, p.routing.num_choices, p.routing.num_slots, p.routing.r_max) = sizes;
  p.d_in = d_in;
  p.num_slices = num_slices;
  int count = 0;
  check(cuda::planes(p, device, &count));
  return count;
}

void backward(int device, Address stream, int dtype, const RoutingArguments& routing, int64_t d_in, const Strided& x,
              const Weights& A, const Strided& dy, const Weights& B, Address h, Address dh, int num_planes,
              Address dots, Address dx_sum, Address dx, const std::vector<Address>& dA, const std::vector<Address>& dB,
              Address dscale, Address dgates, bool first_call, bool last_call) {
  if (A.size() != B.size() || A.size() != dA.size() || A.size() != dB.size() || A.size() > size_t{kMaxSlices}) {
    throw std::invalid_argument("A, B, dA, dB: slices");
  }
  cuda::BackwardParams p = {};
  p.dtype = static_cast<Dtype>(dtype);
  p.routing = routing_of(routing);
  p.d_in = d_in;
  p.num_slices = static_cast<int>(A.size());
  p.first_call = first_call;
  p.last_call = last_call;
  p.x = pointer<const void>(std::get<0>(x));
  p.x_stride = std::get<1>(x);
  p.dy = pointer<const void>(std::get<0>(dy));
  p.dy_stride = std::get<1>(dy);
  fill(p.A, A);
  fill(p.B, B);
  p.h = pointer<float>(h);
  p.dh = pointer<float>(dh);
  p.num_planes = num_planes;
  p.dots = pointer<float>(dots);
  p.dx_sum = pointer<float>(dx_sum);
  p.dx = pointer<void>(dx);
  std::transform(dA.begin(), dA.end(), p.dA, pointer<void>);
  std::transform(dB.begin(), dB.end(), p.dB, pointer<void>);
  p.dscale = pointer<float>(dscale);
  p.dgates = pointer<float>(dgates);
  check(cuda::backward(p, device, pointer<void>(stream)));
}

void plan(int device, Address stream, const RoutingArguments& routing, Address order, Address starts) {
  check(cuda::plan(routing_of(routing), pointer<int32_t>(order), pointer<int32_t>(starts), device,
                   pointer<void>(stream)));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.attr("MAX_SLICES") = kMaxSlices;
  m.attr("UNPLANNED_PAIRS") = cuda::kUnplannedPairs;
  m.def("bgmv", &bgmv, py::kw_only(), py::arg("device"), py::arg("stream"), py::arg("dtype"), py::arg("routing"),
        py::arg("d_in"), py::arg("x"), py::arg("A"), py::arg("y"), py::arg("B"), py::arg("h"), py::arg("num_planes"),
        py::arg("accumulate"), py::call_guard<py::gil_scoped_release>());
  m.def("planes", &planes, py::kw_only(), py::arg("device"), py::arg("dtype"), py::arg("sizes"), py::arg("d_in"),
        py::arg("num_slices"));
  m.def("backward", &backward, py::kw_only(), py::arg("device"), py::arg("stream"), py::arg("dtype"),
        py::arg("routing"), py::arg("d_in"), py::arg("x"), py::arg("A"), py::arg("dy"), py::arg("B"), py::arg("h"),
        py::arg("dh"), py::arg("num_planes"), py::arg("dots"), py::arg("dx_sum"), py::arg("dx"), py::arg("dA"),
        py::arg("dB"), py::arg("dscale"), py::arg("dgates"), py::arg("first_call"), py::arg("last_call"),
        py::call_guard<py::gil_scoped_release>());
  m.def("plan", &plan, py::kw_only(), py::arg("device"), py::arg("stream"), py::arg("routing"), py::arg("order"),
        py::arg("starts"), py::call_guard<py::gil_scoped_release>());
  m.def(
      "preload", [](int device) { check(cuda::preload(device)); }, py::arg("device"),
      py::call_guard<py::gil_scoped_release>());
  m.def("problem", [] { return cuda::problem(); });
}
