// The short way: plain C functions that read torch tensors through DLPack's exchange interface, check what the Python
// path checks, and run the op. They return what the op returns; None, with nothing written, where anything at all is
// unusual or wrong: the Python path then does the general thing or raises. So there are no messages here.
#include "fast_call.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <new>
#include <stdexcept>
#include <utility>
#include <vector>

#include "cpu/lora.h"
#include "dlpack_exchange.h"

namespace py = pybind11;

namespace lorakern {
namespace {

// What a call needs of torch and of the package, looked up once. Lives, like the functions made with it, for ever.
struct Hooks {
  int (*read)(void* object, dlpack::Tensor* out);
  PyTypeObject *tensor, *parameter, *plan;
  PyObject* forced;    // the ContextVar of the backend that the user forces, None for no one
  PyObject* watchers;  // tuple of functions: all return something false unless torch's calls are watched or transformed
  PyObject *grad_enabled, *num_threads, *increment_version, *is_neg, *float32;
  PyObject *requires_grad, *new_empty, *new_zeros, *dtype_keyword;  // names
};

struct Owned {  // a new reference
  PyObject* object;
  explicit Owned(PyObject* o) : object(o) {
    if (!o) PyErr_Clear();
  }
  ~Owned() { Py_XDECREF(object); }
  Owned(const Owned&) = delete;
  // True also where there is no object: what could not be asked counts as unusual.
  bool is_true() const { return !object || PyObject_IsTrue(object) != 0; }
};

// True if the last conversion raised, which is forgotten.
bool failed() {
  const bool raised = PyErr_Occurred();
  PyErr_Clear();
  return raised;
}

struct WithoutGil {
  PyThreadState* state = PyEval_SaveThread();
  ~WithoutGil() { PyEval_RestoreThread(state); }
};

// Buffers for arguments in another form than the kernels take, kept from call to call.
thread_local std::vector<float> scale_buffer;
thread_local std::vector<int32_t> ranks_buffer;
thread_local std::vector<int64_t> indices_buffer;

// The arguments of one call, read step by step; a step returns false for what the short way does not take.
class Call {
 public:
  explicit Call(const Hooks& hooks) : hooks_(hooks) {}
  Call(const Call&) = delete;
  ~Call() {
    for (int i = 0; i < num_held_; ++i) Py_DECREF(held_[i]);
  }

  bool ordinary() {
    PyObject* forced = nullptr;
    if (PyContextVar_Get(hooks_.forced, nullptr, &forced) < 0) PyErr_Clear();
    const Owned backend(forced);
    const bool named = forced && PyUnicode_Check(forced) && PyUnicode_CompareWithASCIIString(forced, "cpu") == 0;
    if (forced != Py_None && !named) return false;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(hooks_.watchers); ++i)
      if (Owned(PyObject_CallNoArgs(PyTuple_GET_ITEM(hooks_.watchers, i))).is_true()) return false;
    grad_ = Owned(PyObject_CallNoArgs(hooks_.grad_enabled)).is_true();
    return true;
  }

  // The matrix that gives the dtype, the number of tokens and the columns.
  bool matrix(PyObject* object, const void** data, int64_t* stride, int64_t* columns) {
    dlpack::Tensor t;
    if (!floats(object, &t) || t.ndim != 2 || t.strides[1] != 1) return false;
    if (params.num_tokens && t.shape[0] != params.num_tokens) return false;
    params.num_tokens = t.shape[0];
    *data = t.data;
    *stride = t.strides[0];
    *columns = t.shape[1];
    return true;
  }

  // One weight or a list of them; `rank_dim` is the dimension of r_max. The first weight sets the slots and r_max.
  bool weights(PyObject* object, int rank_dim, Weight* out) {
    PyObject** const items = hold_slices(object);
    if (!items) return false;
    for (int s = 0; s < params.num_slices; ++s) {
      dlpack::Tensor t;
      if (!floats(items[s], &t) || t.ndim != 3 || (t.shape[2] > 1 && t.strides[2] != 1)) return false;
      if (!params.num_slots) {
        params.num_slots = t.shape[0];
        params.r_max = t.shape[rank_dim];
      }
      if (t.shape[0] != params.num_slots || t.shape[rank_dim] != params.r_max) return false;
      if (rank_dim == 1 && t.shape[2] != params.d_in) return false;
      *out++ = {t.data, t.strides[0], t.strides[1], t.shape[1]};
    }
    return true;
  }

  // A router and its cores for every slice. Comes after the weights.
  bool routers(PyObject* router_A, PyObject* cores, RouterParams* r) {
    PyObject** const first = hold_slices(router_A);
    PyObject** const second = first ? hold_slices(cores) : nullptr;
    if (!second) return false;
    for (int s = 0; s < params.num_slices; ++s) {
      dlpack::Tensor a, c;
      if (!floats(first[s], &a) || a.ndim != 2 || a.shape[1] != params.d_in || (a.shape[1] > 1 && a.strides[1] != 1))
        return false;
      if (s == 0) r->router_rank = a.shape[0];
      if (!routing_floats(second[s], &c) || c.ndim != 3 || (c.shape[2] > 1 && c.strides[2] != 1)) return false;
      if (a.shape[0] != r->router_rank || c.shape[0] != params.num_slots || c.shape[1] != r->router_rank ||
          c.shape[2] != params.r_max)
        return false;
      r->router_A[s] = {a.data, 0, a.strides[0], a.shape[0]};
      r->cores[s] = {c.data, c.strides[0], c.strides[1], c.shape[1]};
    }
    return true;
  }

  // B as (d_out, rank) matrices, each at the beginning of its slot. Comes after B and the ranks.
  bool packed(PyObject* object) {
    params.packed = object == Py_True;
    for (int s = 0; params.packed && s < params.num_slices; ++s)
      if (!params.ranks || (params.B[s].rows > 1 && params.B[s].row_stride != params.r_max)) return false;
    return PyBool_Check(object);
  }

  bool read_indices(PyObject* object) {
    dlpack::Tensor t;
    if (!integers(object, &t) || t.ndim < 1 || t.ndim > 2 || t.shape[0] != params.num_tokens) return false;
    params.num_choices = t.ndim == 2 ? t.shape[1] : 1;
    indices = {t.data, t.dtype.bits / 8, t.strides[0], t.ndim == 2 ? t.strides[1] : 1};
    return true;
  }

  // Rows seg_starts[i]:seg_starts[i + 1] use slots[i]; the others have no adapter.
  bool segments(PyObject* seg_starts, PyObject* slots) {
    dlpack::Tensor starts, of;
    if (!integers(seg_starts, &starts) || !integers(slots, &of) || of.ndim != 1 || !row(of, of.shape[0]) ||
        !row(starts, of.shape[0] + 1))
      return false;
    indices_buffer.assign(params.num_tokens, -1);
    int64_t begin = integer(starts, 0);
    for (int64_t i = 0; i < of.shape[0]; ++i) {
      const int64_t end = integer(starts, i + 1);
      if (begin < 0 || end < begin || end > params.num_tokens) return false;
      std::fill(indices_buffer.begin() + begin, indices_buffer.begin() + end, integer(of, i));
      begin = end;
    }
    params.num_choices = 1;
    indices = {indices_buffer.data(), 8, 1, 1};
    return true;
  }

  bool scale(PyObject* object) {
    if (object == Py_None) return true;
    if (PyFloat_CheckExact(object) || PyLong_CheckExact(object)) {
      const double value = PyFloat_CheckExact(object) ? PyFloat_AS_DOUBLE(object) : PyLong_AsDouble(object);
      if (failed() || !(std::abs(value) <= 0x1p53)) return false;  // what torch rounds otherwise or refuses is beyond
      scale_buffer.assign(params.num_slots, static_cast<float>(value));
      params.scale = scale_buffer.data();
      return true;
    }
    dlpack::Tensor t;
    if (!routing_floats(object, &t) || !row(t, params.num_slots)) return false;
    params.scale = static_cast<const float*>(t.data);
    return true;
  }

  bool ranks(PyObject* object) {
    if (object == Py_None) return true;
    dlpack::Tensor t;
    if (!integers(object, &t) || !row(t, params.num_slots)) return false;
    params.ranks = static_cast<const int32_t*>(t.data);
    if (t.dtype.bits == 32) return true;
    ranks_buffer.resize(params.num_slots);
    const int64_t* wide = static_cast<const int64_t*>(t.data);
    for (int64_t s = 0; s < params.num_slots; ++s) {
      if (wide[s] < 0 || wide[s] > params.r_max) return false;
      ranks_buffer[s] = static_cast<int32_t>(wide[s]);
    }
    params.ranks = ranks_buffer.data();
    return true;
  }

  bool gates(PyObject* object) {
    if (object == Py_None) return true;
    dlpack::Tensor t;
    const int64_t tokens = params.num_tokens, choices = params.num_choices;
    if (!routing_floats(object, &t)) return false;
    const bool fits = t.ndim == 2 ? t.shape[0] == tokens && t.shape[1] == choices &&
                                        (choices == 1 || t.strides[1] == 1) && (tokens == 1 || t.strides[0] == choices)
                                  : choices == 1 && row(t, tokens);
    params.gates = static_cast<const float*>(t.data);
    return fits;
  }

  bool plan(PyObject* object) {
    if (object == Py_None) return true;
    if (Py_TYPE(object) != hooks_.plan || PyTuple_GET_SIZE(object) != 2) return false;
    dlpack::Tensor order, starts;
    if (!integers(PyTuple_GET_ITEM(object, 0), &order) || !integers(PyTuple_GET_ITEM(object, 1), &starts) ||
        order.dtype.bits != 32 || starts.dtype.bits != 32 || !row(order, params.num_tokens * params.num_choices) ||
        !row(starts, params.num_slots + 1))
      return false;
    params.plan = {static_cast<const int32_t*>(order.data), static_cast<const int32_t*>(starts.data)};
    return true;
  }

  // h (slices, T, K, r_max), contiguous.
  bool products(PyObject* object) {
    dlpack::Tensor t;
    if (!routing_floats(object, &t) || t.ndim != 4) return false;
    const int64_t shape[] = {params.num_slices, params.num_tokens, params.num_choices, params.r_max};
    int64_t stride = 1;
    for (int i = 3; i >= 0; --i) {
      if (t.shape[i] != shape[i] || (shape[i] > 1 && t.strides[i] != stride)) return false;
      stride *= shape[i];
    }
    params.h = static_cast<float*>(t.data);
    return true;
  }

  // Where y begins, and whether to add; `room` is the columns of y. Comes after B.
  bool target(PyObject* y_offset, PyObject* accumulate, int64_t room) {
    if (!PyLong_CheckExact(y_offset) || !PyBool_Check(accumulate)) return false;
    const long long offset = PyLong_AsLongLong(y_offset);
    if (failed() || offset < 0 || offset > room - columns()) return false;
    params.y = static_cast<char*>(params.y) + offset * (params.dtype == Dtype::kFloat32 ? 4 : 2);
    params.accumulate = accumulate == Py_True;
    return true;
  }

  // False where the op finds a bad value, before it writes anything.
  template <typename Params>
  bool run(void (*op)(Params, const cpu::Indices&, int), const Params& given) {
    const Owned threads(PyObject_CallNoArgs(hooks_.num_threads));
    const long count = threads.object ? PyLong_AsLong(threads.object) : 0;
    if (failed() || count < 1) return false;
    try {
      WithoutGil released;
      op(given, indices, static_cast<int>(count));
    } catch (const std::invalid_argument&) {
      return false;
    }
    return true;
  }

  // Autograd's note that the tensor has changed; a tensor of inference mode keeps none.
  void mark_written(PyObject* tensor) {
    const Owned tensors(PyTuple_Pack(1, tensor));
    const Owned done(tensors.object ? PyObject_CallOneArg(hooks_.increment_version, tensors.object) : nullptr);
  }

  // A new tensor (a new reference, or null) from a method of `like` that makes one, by name.
  PyObject* make(PyObject* method, PyObject* like, std::initializer_list<int64_t> shape, PyObject* dtype = nullptr) {
    const Owned sizes(PyTuple_New(static_cast<Py_ssize_t>(shape.size())));
    if (!sizes.object) return nullptr;
    Py_ssize_t dim = 0;
    for (const int64_t size : shape) {
      PyObject* number = PyLong_FromLongLong(size);
      if (!number) return PyErr_Clear(), nullptr;
      PyTuple_SET_ITEM(sizes.object, dim++, number);
    }
    PyObject* arguments[] = {like, sizes.object, dtype};
    PyObject* made = PyObject_VectorcallMethod(method, arguments, 2, dtype ? hooks_.dtype_keyword : nullptr);
    if (!made) PyErr_Clear();
    return made;
  }

  int64_t columns() const {
    int64_t sum = 0;
    for (int s = 0; s < params.num_slices; ++s) sum += params.B[s].rows;
    return sum;
  }

  const Hooks& hooks() const { return hooks_; }

  LoraParams params{};
  cpu::Indices indices{};

 private:
  // The tensors of as many slices as any other list has, one or a list of them; null where it is another number.
  PyObject** hold_slices(PyObject* object) {
    const bool list = PyList_CheckExact(object), many = list || PyTuple_CheckExact(object);
    const Py_ssize_t count = list ? PyList_GET_SIZE(object) : many ? PyTuple_GET_SIZE(object) : 1;
    if (count < 1 || count > kMaxSlices || (params.num_slices && count != params.num_slices)) return nullptr;
    params.num_slices = static_cast<int>(count);
    PyObject** const items = held_ + num_held_;
    for (Py_ssize_t s = 0; s < count; ++s)  // whatever releases the GIL from here on, a list may lose them meanwhile
      held_[num_held_++] = Py_NewRef(list ? PyList_GET_ITEM(object, s) : many ? PyTuple_GET_ITEM(object, s) : object);
    return items;
  }

  // Exactly one of the two types that change nothing about a call.
  bool plain(PyObject* object) const { return Py_TYPE(object) == hooks_.tensor || Py_TYPE(object) == hooks_.parameter; }

  // A CPU tensor with elements.
  bool read(PyObject* object, dlpack::Tensor* t) {
    if (hooks_.read(object, t) != 0) {
      PyErr_Clear();
      return false;
    }
    for (int i = 0; i < t->ndim; ++i)
      if (t->shape[i] < 1) return false;
    return t->data && t->device.type == dlpack::kCpu && t->dtype.lanes == 1 && t->byte_offset == 0;
  }

  bool integers(PyObject* object, dlpack::Tensor* t) {
    return plain(object) && read(object, t) && t->dtype.code == dlpack::kInt &&
           (t->dtype.bits == 32 || t->dtype.bits == 64);
  }

  // Floats that no gradient is wanted of and that mean what their memory holds.
  bool plain_floats(PyObject* object, dlpack::Tensor* t) {
    return plain(object) && !(grad_ && Owned(PyObject_GetAttr(object, hooks_.requires_grad)).is_true()) &&
           !Owned(PyObject_Vectorcall(hooks_.is_neg, &object, 1, nullptr)).is_true() && read(object, t);
  }

  // Of the dtype of the call, which the first one sets.
  bool floats(PyObject* object, dlpack::Tensor* t) {
    if (!plain_floats(object, t)) return false;
    Dtype dtype;
    if (t->dtype.code == dlpack::kFloat && t->dtype.bits == 32)
      dtype = Dtype::kFloat32;
    else if (t->dtype.code == dlpack::kFloat && t->dtype.bits == 16)
      dtype = Dtype::kFloat16;
    else if (t->dtype.code == dlpack::kBFloat && t->dtype.bits == 16)
      dtype = Dtype::kBFloat16;
    else
      return false;
    if (!has_dtype_) params.dtype = dtype;
    has_dtype_ = true;
    return params.dtype == dtype;
  }

  bool routing_floats(PyObject* object, dlpack::Tensor* t) {
    return plain_floats(object, t) && t->dtype.code == dlpack::kFloat && t->dtype.bits == 32;
  }

  static bool row(const dlpack::Tensor& t, int64_t count) {
    return t.ndim == 1 && t.shape[0] == count && (count == 1 || t.strides[0] == 1);
  }

  static int64_t integer(const dlpack::Tensor& t, int64_t i) {
    return t.dtype.bits == 64 ? static_cast<const int64_t*>(t.data)[i] : static_cast<const int32_t*>(t.data)[i];
  }

  const Hooks& hooks_;
  bool grad_ = true, has_dtype_ = false;
  PyObject* held_[4 * kMaxSlices];
  int num_held_ = 0;
};

// Each op takes the arguments of its Python function by position, and returns a new reference or null.

bool read_y(Call& call, PyObject* y, int64_t* room) {
  const void* data;
  if (!call.matrix(y, &data, &call.params.y_stride, room)) return false;
  call.params.y = const_cast<void*>(data);
  return true;
}

bool read_x(Call& call, PyObject* x) {
  return call.matrix(x, &call.params.x, &call.params.x_stride, &call.params.d_in);
}

template <typename Params>
PyObject* run_on_y(Call& call, void (*op)(Params, const cpu::Indices&, int), const Params& params, PyObject* y) {
  if (!call.run(op, params)) return nullptr;
  call.mark_written(y);
  return Py_NewRef(y);
}

PyObject* bgmv(Call& call, PyObject* y, PyObject* x, PyObject* A, PyObject* B, PyObject* indices, PyObject* scale,
               PyObject* ranks, PyObject* gates, PyObject* plan, PyObject* y_offset, PyObject* accumulate,
               PyObject* packed) {
  LoraParams& p = call.params;
  int64_t room;
  const bool taken = read_y(call, y, &room) && read_x(call, x) && call.weights(A, 1, p.A) && call.weights(B, 2, p.B) &&
                     call.read_indices(indices) && call.scale(scale) && call.ranks(ranks) && call.gates(gates) &&
                     call.plan(plan) && call.target(y_offset, accumulate, room) && call.packed(packed);
  return taken ? run_on_y(call, cpu::bgmv, p, y) : nullptr;
}

PyObject* routed_bgmv(Call& call, PyObject* y, PyObject* x, PyObject* A, PyObject* B, PyObject* router_A,
                      PyObject* cores, PyObject* indices, PyObject* scale, PyObject* ranks, PyObject* plan,
                      PyObject* y_offset, PyObject* accumulate) {
  LoraParams& p = call.params;
  RouterParams r{};
  int64_t room;
  const bool taken = read_y(call, y, &room) && read_x(call, x) && call.weights(A, 1, p.A) && call.weights(B, 2, p.B) &&
                     call.routers(router_A, cores, &r) && call.read_indices(indices) && call.scale(scale) &&
                     call.ranks(ranks) && call.plan(plan) && call.target(y_offset, accumulate, room);
  if (!taken) return nullptr;
  r.lora = p;
  return run_on_y(call, cpu::routed_bgmv, r, y);
}

PyObject* sgmv(Call& call, PyObject* y, PyObject* x, PyObject* A, PyObject* B, PyObject* seg_starts, PyObject* slots,
               PyObject* scale, PyObject* ranks, PyObject* y_offset, PyObject* accumulate) {
  LoraParams& p = call.params;
  int64_t room;
  const bool taken = read_y(call, y, &room) && read_x(call, x) && call.weights(A, 1, p.A) && call.weights(B, 2, p.B) &&
                     call.segments(seg_starts, slots) && call.scale(scale) && call.ranks(ranks) &&
                     call.target(y_offset, accumulate, room);
  return taken ? run_on_y(call, cpu::bgmv, p, y) : nullptr;
}

PyObject* lora_delta(Call& call, PyObject* x, PyObject* A, PyObject* B, PyObject* indices, PyObject* scale,
                     PyObject* ranks, PyObject* gates, PyObject* plan) {
  LoraParams& p = call.params;
  const bool taken = read_x(call, x) && call.weights(A, 1, p.A) && call.weights(B, 2, p.B) &&
                     call.read_indices(indices) && call.scale(scale) && call.ranks(ranks) && call.gates(gates) &&
                     call.plan(plan);
  if (!taken) return nullptr;
  Owned y(call.make(call.hooks().new_zeros, x, {p.num_tokens, call.columns()}));
  int64_t room;
  const bool done = y.object && read_y(call, y.object, &room) && call.run(cpu::bgmv, p);
  return done ? Py_NewRef(y.object) : nullptr;
}

PyObject* shrink(Call& call, PyObject* x, PyObject* A, PyObject* indices, PyObject* ranks, PyObject* plan,
                 PyObject* out) {
  LoraParams& p = call.params;
  const bool taken =
      read_x(call, x) && call.weights(A, 1, p.A) && call.read_indices(indices) && call.ranks(ranks) && call.plan(plan);
  if (!taken) return nullptr;
  const Owned h(out != Py_None ? Py_NewRef(out)
                               : call.make(call.hooks().new_empty, x,
                                           {p.num_slices, p.num_tokens, p.num_choices, p.r_max}, call.hooks().float32));
  return h.object && call.products(h.object) ? run_on_y(call, cpu::shrink, p, h.object) : nullptr;
}

PyObject* expand(Call& call, PyObject* y, PyObject* h, PyObject* B, PyObject* indices, PyObject* scale, PyObject* ranks,
                 PyObject* gates, PyObject* plan, PyObject* y_offset, PyObject* accumulate, PyObject* packed) {
  int64_t room;
  const bool taken = read_y(call, y, &room) && call.weights(B, 2, call.params.B) && call.read_indices(indices) &&
                     call.scale(scale) && call.ranks(ranks) && call.gates(gates) && call.plan(plan) &&
                     call.products(h) && call.target(y_offset, accumulate, room) && call.packed(packed);
  return taken ? run_on_y(call, cpu::expand, call.params, y) : nullptr;
}

template <typename... Arguments>
constexpr size_t arity(PyObject* (*)(Call&, Arguments...)) {
  return sizeof...(Arguments);
}

template <typename... Arguments, size_t... I>
PyObject* spread(PyObject* (*op)(Call&, Arguments...), Call& call, PyObject* const* values, std::index_sequence<I...>) {
  return op(call, values[I]...);
}

template <auto op>
PyObject* entry(PyObject* self, PyObject* const* values, Py_ssize_t count) {
  constexpr size_t arguments = arity(op);
  if (count != static_cast<Py_ssize_t>(arguments)) {
    PyErr_Format(PyExc_TypeError, "takes %zu positional arguments; got %zd", arguments, count);
    return nullptr;
  }
  try {
    Call call(*static_cast<const Hooks*>(PyCapsule_GetPointer(self, nullptr)));
    PyObject* result = call.ordinary() ? spread(op, call, values, std::make_index_sequence<arguments>()) : nullptr;
    return result ? result : Py_NewRef(Py_None);
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

template <auto op>
PyMethodDef method(const char* name) {
  const auto function = reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&entry<op>));
  return {name, function, METH_FASTCALL, "The op of that name by position; None, and nothing done, where unusual."};
}

// The reader of tensors in a capsule of the exchange interface, or null where it has none that we know.
auto reader_of(py::handle capsule) -> decltype(Hooks::read) {
  if (!PyCapsule_IsValid(capsule.ptr(), dlpack::kCapsuleName)) return nullptr;
  auto* api = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), dlpack::kCapsuleName));
  while (api && api->version.major != dlpack::kMajor) api = api->older;
  return api ? api->tensor_from_object : nullptr;
}

// The ops as functions of positional arguments, by name; empty where the capsule has no interface that we know.
py::dict make_fast_calls(py::object capsule, py::type tensor, py::type parameter, py::type plan, py::object forced,
                         py::tuple watchers, py::object grad_enabled, py::object num_threads,
                         py::object increment_version, py::object is_neg, py::object float32) {
  static PyMethodDef methods[] = {
      method<&bgmv>("bgmv"),     method<&sgmv>("sgmv"),     method<&lora_delta>("lora_delta"),
      method<&shrink>("shrink"), method<&expand>("expand"), method<&routed_bgmv>("routed_bgmv")};
  py::dict made;
  const auto read = reader_of(capsule);
  if (!read) return made;
  const auto kept = [](py::object& object) { return object.release().ptr(); };
  const auto type = [&](py::object& object) { return reinterpret_cast<PyTypeObject*>(kept(object)); };
  auto* hooks = new Hooks;
  hooks->read = read;
  hooks->tensor = type(tensor);
  hooks->parameter = type(parameter);
  hooks->plan = type(plan);
  hooks->forced = kept(forced);
  hooks->watchers = kept(watchers);
  hooks->grad_enabled = kept(grad_enabled);
  hooks->num_threads = kept(num_threads);
  hooks->increment_version = kept(increment_version);
  hooks->is_neg = kept(is_neg);
  hooks->float32 = kept(float32);
  hooks->requires_grad = PyUnicode_InternFromString("requires_grad");
  hooks->new_empty = PyUnicode_InternFromString("new_empty");
  hooks->new_zeros = PyUnicode_InternFromString("new_zeros");
  hooks->dtype_keyword = py::make_tuple("dtype").release().ptr();
  const py::capsule self(hooks);
  for (PyMethodDef& definition : methods)
    made[definition.ml_name] = py::reinterpret_steal<py::object>(PyCFunction_New(&definition, self.ptr()));
  return made;
}

}  // namespace

void define_fast_calls(py::module_& m) { m.def("make_fast_calls", &make_fast_calls); }

}  // namespace lorakern
