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

void bgmv(int device, uintptr_t stream, int dtype, const Sizes& sizes, const Strided& y, const Strided& x,
          const Weights& A, const Weights& B, uintptr_t h, const PairIntegers& indices, const Strided& scale,
          const StridedIntegers& ranks, const Pairs& gates, bool accumulate) {
  if (A.size() != B.size() || A.size() > size_t{kMaxSlices}) throw std::invalid_argument("A, B: slices");
  cuda::BgmvParams p = {};
  p.dtype = static_cast<Dtype>(dtype);
  std::tie(p.num_tokens, p.num_choices, p.num_slots, p.r_max, p.d_in) = sizes;
  p.num_slices = static_cast<int>(A.size());
  p.x = pointer<const void>(std::get<0>(x));
  p.x_stride = std::get<1>(x);
  fill(p.A, A);
  fill(p.B, B);
  p.y = pointer<void>(std::get<0>(y));
  p.y_stride = std::get<1>(y);
  p.h = pointer<float>(h);
  p.indices = {pointer<const void>(std::get<0>(indices)), std::get<3>(indices)};
  p.indices_token_stride = std::get<1>(indices);
  p.indices_choice_stride = std::get<2>(indices);
  p.scale = pointer<const float>(std::get<0>(scale));
  p.scale_stride = std::get<1>(scale);
  p.ranks = {pointer<const void>(std::get<0>(ranks)), std::get<2>(ranks)};
  p.ranks_stride = std::get<1>(ranks);
  p.gates = pointer<const float>(std::get<0>(gates));
  p.gates_token_stride = std::get<1>(gates);
  p.gates_choice_stride = std::get<2>(gates);
  p.accumulate = accumulate;
  check(cuda::bgmv(p, device, pointer<void>(stream)));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.attr("MAX_SLICES") = kMaxSlices;
  m.def("bgmv", &bgmv, py::kw_only(), py::arg("device"), py::arg("stream"), py::arg("dtype"), py::arg("sizes"),
        py::arg("y"), py::arg("x"), py::arg("A"), py::arg("B"), py::arg("h"), py::arg("indices"), py::arg("scale"),
        py::arg("ranks"), py::arg("gates"), py::arg("accumulate"), py::call_guard<py::gil_scoped_release>());
  m.def(
      "preload", [](int device) { check(cuda::preload(device)); }, py::arg("device"),
      py::call_guard<py::gil_scoped_release>());
  m.def("problem", [] { return cuda::problem(); });
}
