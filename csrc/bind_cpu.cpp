// lorakern._cpu: the CPU ops for Python. Nothing but argument passing: pointers are integers, strides count elements.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/finite.h"
#include "cpu/gram.h"
#include "cpu/kmeans.h"
#include "cpu/lora.h"
#include "cpu/probe.h"
#include "cpu/threads.h"
#include "fast_call.h"

namespace py = pybind11;

namespace {

using namespace lorakern;

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

using WeightTuple = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;            // data, slot stride, row stride, rows
using IndexTuple = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;             // data, bytes, strides
using SizeTuple = std::tuple<int, int64_t, int64_t, int64_t, int64_t, int64_t>;  // dtype, T, K, slots, r_max, d_in
using MatrixTuple = std::tuple<uintptr_t, int64_t>;                              // data, row stride
using RoutingTuple =
    std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t>;   // scale ranks gates order starts
using SetTuple = std::tuple<uintptr_t, int, int64_t, int64_t, int64_t>;  // data, dtype, rows, row and column stride
using RowsTuple = std::tuple<int64_t, int64_t>;                          // sets, columns
// products, first, factors, allowed, ratios, step
using LinesTuple = std::tuple<uintptr_t, int64_t, uintptr_t, double, uintptr_t, double>;
using PointsTuple = std::tuple<int64_t, uintptr_t>;                                   // parts, scales
using AssignTuple = std::tuple<uintptr_t, int64_t, uintptr_t, uintptr_t, uintptr_t>;  // centroids, k, outputs
// members, labels, weights, k, centroids, counts, inertia
using UpdateTuple = std::tuple<uintptr_t, uintptr_t, uintptr_t, int64_t, uintptr_t, uintptr_t, uintptr_t>;
using CloudTuple = std::tuple<uintptr_t, uintptr_t, int64_t, int64_t>;  // gram, weights, count, k
// seeds, runs, first labels, first sqdist; labels, members, iterations
using LloydTuple = std::tuple<uintptr_t, int64_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t>;

cpu::Indices indices_of(const IndexTuple& t) {
  return {pointer<const void>(std::get<0>(t)), std::get<1>(t), std::get<2>(t), std::get<3>(t)};
}

void fill(Weight* out, const std::vector<WeightTuple>& weights) {
  if (weights.size() > kMaxSlices)
    throw std::invalid_argument("at most " + std::to_string(kMaxSlices) + " slices in one call; got " +
                                std::to_string(weights.size()));
  for (const auto& [data, slot_stride, row_stride, rows] : weights)
    *out++ = {pointer<const void>(data), slot_stride, row_stride, rows};
}

LoraParams params_of(const SizeTuple& sizes, const std::vector<WeightTuple>& A, const std::vector<WeightTuple>& B,
                     const RoutingTuple& routing) {
  LoraParams p{};
  int dtype;
  std::tie(dtype, p.num_tokens, p.num_choices, p.num_slots, p.r_max, p.d_in) = sizes;
  p.dtype = static_cast<Dtype>(dtype);
  p.num_slices = static_cast<int>(A.empty() ? B.size() : A.size());
  fill(p.A, A);
  fill(p.B, B);
  p.scale = pointer<const float>(std::get<0>(routing));
  p.ranks = pointer<const int32_t>(std::get<1>(routing));
  p.gates = pointer<const float>(std::get<2>(routing));
  p.plan = {pointer<const int32_t>(std::get<3>(routing)), pointer<const int32_t>(std::get<4>(routing))};
  return p;
}

void plan(const IndexTuple& indices, int64_t tokens, int64_t choices, int64_t slots, uintptr_t order,
          uintptr_t starts) {
  cpu::make_plan(indices_of(indices), tokens, choices, slots, pointer<int32_t>(order), pointer<int32_t>(starts));
}

void shrink(uintptr_t h, const MatrixTuple& x, const std::vector<WeightTuple>& A, const SizeTuple& sizes,
            const IndexTuple& indices, const RoutingTuple& routing, int threads) {
  LoraParams p = params_of(sizes, A, {}, routing);
  p.h = pointer<float>(h);
  p.x = pointer<const void>(std::get<0>(x));
  p.x_stride = std::get<1>(x);
  py::gil_scoped_release release;
  cpu::shrink(p, indices_of(indices), threads);
}

void expand(const MatrixTuple& y, uintptr_t h, const std::vector<WeightTuple>& B, const SizeTuple& sizes,
            const IndexTuple& indices, const RoutingTuple& routing, bool accumulate, bool packed, int threads) {
  LoraParams p = params_of(sizes, {}, B, routing);
  p.packed = packed;
  p.h = pointer<float>(h);
  p.y = pointer<void>(std::get<0>(y));
  p.y_stride = std::get<1>(y);
  p.accumulate = accumulate;
  py::gil_scoped_release release;
  cpu::expand(p, indices_of(indices), threads);
}

void bgmv(const MatrixTuple& y, const MatrixTuple& x, const std::vector<WeightTuple>& A,
          const std::vector<WeightTuple>& B, const SizeTuple& sizes, const IndexTuple& indices,
          const RoutingTuple& routing, bool accumulate, bool packed, int threads) {
  LoraParams p = params_of(sizes, A, B, routing);
  p.packed = packed;
  p.x = pointer<const void>(std::get<0>(x));
  p.x_stride = std::get<1>(x);
  p.y = pointer<void>(std::get<0>(y));
  p.y_stride = std::get<1>(y);
  p.accumulate = accumulate;
  py::gil_scoped_release release;
  cpu::bgmv(p, indices_of(indices), threads);
}

RouterParams router_of(const LoraParams& lora, const std::vector<WeightTuple>& router_A,
                       const std::vector<WeightTuple>& cores) {
  RouterParams r{};
  r.lora = lora;
  fill(r.router_A, router_A);
  fill(r.cores, cores);
  r.router_rank = r.router_A[0].rows;
  return r;
}

void attention_gates(uintptr_t gates, const MatrixTuple& x, uintptr_t h, const std::vector<WeightTuple>& router_A,
                     const std::vector<WeightTuple>& cores, const SizeTuple& sizes, const IndexTuple& indices,
                     const RoutingTuple& routing, int threads) {
  RouterParams r = router_of(params_of(sizes, {}, {}, routing), router_A, cores);
  r.lora.num_slices = static_cast<int>(router_A.size());
  r.lora.x = pointer<const void>(std::get<0>(x));
  r.lora.x_stride = std::get<1>(x);
  r.lora.h = pointer<float>(h);
  r.gates = pointer<float>(gates);
  py::gil_scoped_release release;
  cpu::attention_gates(r, indices_of(indices), threads);
}

void routed_bgmv(const MatrixTuple& y, const MatrixTuple& x, const std::vector<WeightTuple>& A,
                 const std::vector<WeightTuple>& B, const std::vector<WeightTuple>& router_A,
                 const std::vector<WeightTuple>& cores, const SizeTuple& sizes, const IndexTuple& indices,
                 const RoutingTuple& routing, bool accumulate, int threads) {
  RouterParams r = router_of(params_of(sizes, A, B, routing), router_A, cores);
  r.lora.x = pointer<const void>(std::get<0>(x));
  r.lora.x_stride = std::get<1>(x);
  r.lora.y = pointer<void>(std::get<0>(y));
  r.lora.y_stride = std::get<1>(y);
  r.lora.accumulate = accumulate;
  py::gil_scoped_release release;
  cpu::routed_bgmv(r, indices_of(indices), threads);
}

void backward(const MatrixTuple& dy, const MatrixTuple& x, const std::vector<WeightTuple>& A,
              const std::vector<WeightTuple>& B, const SizeTuple& sizes, const IndexTuple& indices,
              const RoutingTuple& routing, uintptr_t dx, const std::vector<uintptr_t>& dA,
              const std::vector<uintptr_t>& dB, uintptr_t dscale, uintptr_t dgates, int threads) {
  LoraGradParams g{};
  g.forward = params_of(sizes, A, B, routing);
  g.forward.x = pointer<const void>(std::get<0>(x));
  g.forward.x_stride = std::get<1>(x);
  g.dy = pointer<const void>(std::get<0>(dy));
  g.dy_stride = std::get<1>(dy);
  g.dx = pointer<void>(dx);
  for (size_t s = 0; s < dA.size(); ++s) g.dA[s] = pointer<void>(dA[s]);
  for (size_t s = 0; s < dB.size(); ++s) g.dB[s] = pointer<void>(dB[s]);
  g.dscale = pointer<float>(dscale);
  g.dgates = pointer<float>(dgates);
  py::gil_scoped_release release;
  cpu::backward(g, indices_of(indices), threads);
}

// X of every problem: it has the next of the sets.
std::vector<Rows> rows_of(const std::vector<RowSet>& sets, const std::vector<RowsTuple>& problems) {
  std::vector<Rows> out;
  const RowSet* next = sets.data();
  for (const auto& [num_sets, columns] : problems) {
    int64_t total = 0;
    for (int64_t s = 0; s < num_sets; ++s) total += next[s].rows;
    out.push_back({next, num_sets, total, columns});
    next += num_sets;
  }
  return out;
}

RowSet set_of(const SetTuple& given) {
  const auto& [data, dtype, count, row_stride, column_stride] = given;
  return {pointer<const void>(data), static_cast<Dtype>(dtype), count, row_stride, column_stride};
}

std::vector<RowSet> sets_of(const std::vector<SetTuple>& given) {
  std::vector<RowSet> sets;
  for (const SetTuple& set : given) sets.push_back(set_of(set));
  return sets;
}

void gram(const std::vector<SetTuple>& given, const std::vector<RowsTuple>& sizes, const std::vector<uintptr_t>& out,
          int threads) {
  const std::vector<RowSet> sets = sets_of(given);
  std::vector<GramProblem> problems;
  for (const Rows& x : rows_of(sets, sizes)) problems.push_back({x, pointer<double>(out.at(problems.size()))});
  py::gil_scoped_release release;
  cpu::gram(problems, threads);
}

void sketch(const std::vector<SetTuple>& given, const std::vector<RowsTuple>& sizes,
            const std::vector<uintptr_t>& probes, const std::vector<uintptr_t>& out, int threads) {
  const std::vector<RowSet> sets = sets_of(given);
  std::vector<SketchProblem> problems;
  for (const Rows& x : rows_of(sets, sizes)) {
    const size_t i = problems.size();
    problems.push_back({x, pointer<const double>(probes.at(i)), pointer<double>(out.at(i))});
  }
  py::gil_scoped_release release;
  cpu::sketch(problems, threads);
}

void lines(const std::vector<SetTuple>& given, const std::vector<RowsTuple>& sizes,
           const std::vector<LinesTuple>& lines, uintptr_t out, int threads) {
  const std::vector<RowSet> sets = sets_of(given);
  std::vector<LinesProblem> problems;
  for (const Rows& x : rows_of(sets, sizes)) {
    const size_t i = problems.size();
    const auto& [products, first, factors, allowed, ratios, step] = lines.at(i);
    problems.push_back({x, pointer<const double>(products), first, pointer<const double>(factors), allowed,
                        pointer<const double>(ratios), step, pointer<double>(out) + kLineNumbers * i});
  }
  py::gil_scoped_release release;
  cpu::lines(problems, threads);
}

void combine(const std::vector<SetTuple>& given, const std::vector<RowsTuple>& sizes,
             const std::vector<uintptr_t>& factors, const std::vector<SetTuple>& out, int threads) {
  const std::vector<RowSet> sets = sets_of(given);
  std::vector<CombineProblem> problems;
  for (const Rows& x : rows_of(sets, sizes)) {
    const size_t i = problems.size();
    problems.push_back({x, pointer<const double>(factors.at(i)), set_of(out.at(i))});
  }
  py::gil_scoped_release release;
  cpu::combine(problems, threads);
}

// The points of every problem: it has the next of the parts, and each part the next of the sets.
class PointsBatch {
 public:
  PointsBatch(const std::vector<SetTuple>& sets, const std::vector<RowsTuple>& parts,
              const std::vector<PointsTuple>& problems)
      : sets_(sets_of(sets)), parts_(rows_of(sets_, parts)) {
    const Rows* next = parts_.data();
    for (const auto& [num_parts, scales] : problems) {
      int64_t columns = 0;
      for (int64_t p = 0; p < num_parts; ++p) columns += next[p].columns;
      points_.push_back({next, num_parts, next->rows, columns, pointer<const float>(scales)});
      next += num_parts;
    }
  }
  size_t size() const { return points_.size(); }
  const Points& operator[](size_t i) const { return points_[i]; }

 private:
  std::vector<RowSet> sets_;
  std::vector<Rows> parts_;
  std::vector<Points> points_;
};

void points_gram(const std::vector<SetTuple>& sets, const std::vector<RowsTuple>& parts,
                 const std::vector<PointsTuple>& points, const std::vector<uintptr_t>& out, int threads) {
  const PointsBatch batch(sets, parts, points);
  std::vector<PointsGramProblem> problems;
  for (size_t i = 0; i < batch.size(); ++i) problems.push_back({batch[i], pointer<float>(out.at(i))});
  py::gil_scoped_release release;
  cpu::points_gram(problems, threads);
}

void assign(const std::vector<SetTuple>& sets, const std::vector<RowsTuple>& parts,
            const std::vector<PointsTuple>& points, const std::vector<AssignTuple>& given, int threads) {
  const PointsBatch batch(sets, parts, points);
  std::vector<AssignProblem> problems;
  for (size_t i = 0; i < batch.size(); ++i) {
    const auto& [centroids, k, labels, sqdist, distances] = given.at(i);
    problems.push_back({batch[i], pointer<const float>(centroids), k, pointer<int64_t>(labels), pointer<float>(sqdist),
                        pointer<float>(distances)});
  }
  py::gil_scoped_release release;
  cpu::assign(problems, threads);
}

void update(const std::vector<SetTuple>& sets, const std::vector<RowsTuple>& parts,
            const std::vector<PointsTuple>& points, const std::vector<UpdateTuple>& given, int threads) {
  const PointsBatch batch(sets, parts, points);
  std::vector<UpdateProblem> problems;
  for (size_t i = 0; i < batch.size(); ++i) {
    const auto& [members, labels, weights, k, centroids, counts, inertia] = given.at(i);
    problems.push_back({batch[i], pointer<const int64_t>(members), pointer<const int64_t>(labels),
                        pointer<const double>(weights), k, pointer<float>(centroids), pointer<double>(counts),
                        pointer<double>(inertia)});
  }
  py::gil_scoped_release release;
  cpu::update(problems, threads);
}

Cloud cloud_of(const CloudTuple& t) {
  return {pointer<const float>(std::get<0>(t)), pointer<const double>(std::get<1>(t)), std::get<2>(t), std::get<3>(t)};
}

void seed(const std::vector<CloudTuple>& clouds, uintptr_t uniforms, int64_t runs, int64_t stride,
          const std::vector<int64_t>& trials, const std::vector<uintptr_t>& seeds, int threads) {
  std::vector<SeedProblem> problems;
  for (size_t i = 0; i < clouds.size(); ++i)
    problems.push_back({cloud_of(clouds[i]), pointer<const double>(uniforms), runs, trials.at(i), stride,
                        pointer<int64_t>(seeds.at(i))});
  py::gil_scoped_release release;
  cpu::seed(problems, threads);
}

void lloyd(const std::vector<CloudTuple>& clouds, const std::vector<LloydTuple>& given, int64_t max_iterations,
           const std::vector<double>& tolerances, int threads) {
  std::vector<LloydProblem> problems;
  for (size_t i = 0; i < clouds.size(); ++i) {
    const auto& [seeds, runs, first_labels, first_sqdist, labels, members, iterations] = given.at(i);
    problems.push_back({cloud_of(clouds[i]), pointer<const int64_t>(seeds), runs, pointer<const int64_t>(first_labels),
                        pointer<const double>(first_sqdist), max_iterations, tolerances.at(i), pointer<int64_t>(labels),
                        pointer<int64_t>(members), pointer<int64_t>(iterations)});
  }
  py::gil_scoped_release release;
  cpu::lloyd(problems, threads);
}

bool all_finite(uintptr_t data, int dtype, int64_t count) {
  py::gil_scoped_release release;
  return cpu::all_finite(pointer<const void>(data), static_cast<Dtype>(dtype), count);
}

uint64_t read_buffer(uintptr_t data, int64_t bytes, int threads) {
  py::gil_scoped_release release;
  return cpu::read_buffer(pointer<const void>(data), bytes, threads);
}

py::tuple fma_loop(bool bf16, int64_t rounds, int threads) {
  const cpu::FmaLoop done = [&] {
    py::gil_scoped_release release;
    return cpu::fma_loop(bf16, rounds, threads);
  }();
  return py::make_tuple(done.instruction, done.operations, done.checksum);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.attr("max_slices") = kMaxSlices;
  m.def("all_finite", &all_finite);
  m.def("read_buffer", &read_buffer);
  m.def("fma_loop", &fma_loop);
  m.def("plan", &plan);
  m.def("shrink", &shrink);
  m.def("expand", &expand);
  m.def("bgmv", &bgmv);
  m.def("attention_gates", &attention_gates);
  m.def("routed_bgmv", &routed_bgmv);
  m.def("backward", &backward);
  m.attr("probes") = kProbes;
  m.def("gram", &gram);
  m.def("sketch", &sketch);
  m.def("lines", &lines);
  m.def("combine", &combine);
  m.def("points_gram", &points_gram);
  m.def("kmeans_assign", &assign);
  m.def("kmeans_update", &update);
  m.def("kmeans_seed", &seed);
  m.def("kmeans_lloyd", &lloyd);
  m.def("usable_isas", &cpu::usable_isas);
  m.def("current_isa", &cpu::current_isa);
  m.def("force_isa", &cpu::force_isa);
  m.def("has_thread_pool", &has_thread_pool);
  define_fast_calls(m);
}
