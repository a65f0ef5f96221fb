// Units and matches of the native watcher: see watch.cpp.
#pragma once

#include <ATen/Context.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <vector>

// Declared here, as their header takes four seconds to compile.
namespace torch::jit {
TORCH_PYTHON_API c10::IValue toIValue(py::handle, const c10::TypePtr&, std::optional<int32_t> N = std::nullopt);
TORCH_PYTHON_API py::object toPyObject(c10::IValue);
}  // namespace torch::jit

namespace revfx {
using at::Tensor;
using c10::DispatchKey;
using c10::DispatchKeySet;
using c10::IValue;
using c10::OperatorHandle;
using c10::TensorImpl;
using Arguments = c10::ArrayRef<IValue>;
using Stack = torch::jit::Stack;
using WeakTensor = c10::weak_intrusive_ptr<TensorImpl, c10::UndefinedTensorImpl>;
using Shape = std::optional<std::vector<int64_t>>;

constexpr DispatchKey KEY = DispatchKey::Fake;
// Nothing above a dispatch mode's place runs for the operators of a callback, as in a handler of `__torch_dispatch__`.
inline const DispatchKeySet ABOVE =
    (DispatchKeySet(DispatchKeySet::FULL) - DispatchKeySet(DispatchKeySet::FULL_AFTER, DispatchKey::Python) -
     DispatchKeySet({DispatchKey::Python, DispatchKey::ZeroTensor, DispatchKey::Conjugate, DispatchKey::Negative}))
        .add(KEY);
// The keys of `dispatch.alias`: autograd counts the writes to a tensor and to its alias together.
inline const DispatchKeySet INCLUDED = c10::default_included_set;
inline const DispatchKeySet EXCLUDED =
    c10::default_excluded_set | DispatchKeySet({DispatchKey::Python, DispatchKey::PythonTLSSnapshot});
inline int64_t aligned_bytes = 64, aligned_bytes_elsewhere = 256;  // as in layout.py, which sets them

// --- units, as native.py describes them
struct Argument {
  enum Kind { MADE, FIRST_EXTERNAL, EXTERNAL, NUMBER, CONSTANT, LIST, ANY } kind = CONSTANT;
  int64_t index = -1;  // a slot, or a number's
  Shape shape;
  bool has_layout = false;
  IValue constant;
  std::vector<Argument> items;
};

struct Result {
  enum Kind { IGNORED, EXTERNAL, MADE, AGAIN } kind = IGNORED;
  enum Hold { NONE, SAME, DETACH, ALIAS, COPY };
  int64_t slot = -1;
  Shape shape;
  Hold held = NONE, alive = NONE;
  bool has_layout = false;
};

struct Operator {
  OperatorHandle handle;
  std::vector<Argument> arguments;
  std::vector<Result> results;
  bool is_single;               // it returns one tensor and no sequence
  bool draws;                   // the random state is noted before it
  std::vector<int64_t> cloned;  // external slots to copy before it
  std::vector<std::pair<int64_t, int64_t>> rewritten;  // results to hold after it: the first slot, and the slot now
};

// Return the type of an argument's values other than None.
inline c10::TypePtr required(const c10::TypePtr& type) {
  auto optional = type->cast<c10::OptionalType>();
  return optional ? optional->getElementType() : type;
}

inline IValue constant_of(py::handle value, const c10::TypePtr& type) {
  auto kind = required(type)->kind();
  bool takes_scalars = kind == c10::TypeKind::NumberType || kind == c10::TypeKind::TensorType;
  if (takes_scalars && PyBool_Check(value.ptr())) return value.cast<bool>();
  if (takes_scalars && PyLong_Check(value.ptr())) return value.cast<int64_t>();
  if (takes_scalars && PyFloat_Check(value.ptr())) return value.cast<double>();
  if (takes_scalars && PyComplex_Check(value.ptr())) return value.cast<c10::complex<double>>();
  if (value.is_none()) return IValue();
  return torch::jit::toIValue(value, type);
}

using Renamed = std::tuple<size_t, int64_t, int64_t>;  // the operator that wrote, the first slot, the slot from then on

struct Unit {
  int64_t slots, numbers;
  bool drops;  // something in several operators, so that it may begin wherever its first one matches
  std::vector<Renamed> renamed;
  std::vector<int64_t> read;  // slots of tensors that are read again when the operators have run
  std::vector<Operator> operators;

  Unit(int64_t slots, int64_t numbers, bool drops, std::vector<Renamed> renamed, std::vector<int64_t> read)
      : slots(slots), numbers(numbers), drops(drops), renamed(std::move(renamed)), read(std::move(read)) {}

  // Return the slot of a result when so many operators have run.
  int64_t slot_at(int64_t slot, size_t at) const {
    int64_t now = slot;
    for (const auto& [writer, first, then] : renamed)
      if (first == slot && writer < at) now = then;
    return now;
  }

  void add(const std::string& name, const std::string& overload, const py::list& arguments, const py::list& results,
           bool is_single, bool draws, std::vector<int64_t> cloned,
           std::vector<std::pair<int64_t, int64_t>> rewritten) {
    auto handle = c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), overload.c_str());
    operators.push_back({handle, {}, {}, is_single, draws, std::move(cloned), std::move(rewritten)});
    const auto& expected = handle.schema().arguments();
    TORCH_CHECK(expected.size() == arguments.size(), name, " has other arguments");
    for (size_t i = 0; i < expected.size(); i++)
      operators.back().arguments.push_back(argument(arguments[i], expected[i].type(), expected[i].default_value()));
    for (py::handle r : results) {
      auto [kind, slot, shape, held, alive, layout] = r.cast<std::tuple<int, int64_t, Shape, int, int, bool>>();
      operators.back().results.push_back(
          {Result::Kind(kind), slot, shape, Result::Hold(held), Result::Hold(alive), layout});
    }
  }

  static Argument argument(py::handle pattern, const c10::TypePtr& type, const std::optional<IValue>& fallback) {
    Argument a;
    if (pattern.is_none()) {  // the handler in Python was not given it
      TORCH_CHECK(fallback.has_value(), "an argument without a default is missing");
      a.constant = *fallback;
      return a;
    }
    auto [kind, index, shape, has_layout, value] = pattern.cast<std::tuple<int, int64_t, Shape, bool, py::object>>();
    a.kind = Argument::Kind(kind), a.index = index, a.shape = shape, a.has_layout = has_layout;
    if (a.kind == Argument::LIST) {
      auto item_type = required(type)->expectRef<c10::ListType>().getElementType();
      for (py::handle item : value) a.items.push_back(argument(item, item_type, {}));
    } else if (a.kind == Argument::CONSTANT) {
      a.constant = constant_of(value, type);
    }
    return a;
  }
};

// --- values
inline bool is_wrapped(const Tensor& t) { return t.unsafeGetTensorImpl()->is_wrapped_number(); }

inline bool is_tensor(const IValue& v) { return v.isTensor() && v.toTensor().defined() && !is_wrapped(v.toTensor()); }

// Return whether the elements of a tensor have a place in memory.
inline bool is_strided(const Tensor& t) {
  return t.layout() == at::kStrided && t.has_storage() && !t.is_nested() &&
         !t.unsafeGetTensorImpl()->is_python_dispatch();
}

// Return the memory that a tensor shares with its views; null if it has none of its own.
inline const void* memory_of(const Tensor& t) {
  return t.defined() && is_strided(t) ? t.storage().unsafeGetStorageImpl() : nullptr;
}

// Return by how many bytes the address of a tensor lies beyond an aligned one.
inline int64_t offset_of(const Tensor& t) {
  int64_t aligned = t.is_cpu() ? aligned_bytes : aligned_bytes_elsewhere;
  return int64_t(reinterpret_cast<uintptr_t>(t.const_data_ptr()) % aligned);
}

// Return a copy that lies in memory as the tensor does: `copied` of layout.py.
inline Tensor copy_of(const Tensor& original) {
  Tensor t = original.detach();
  if (!is_strided(t) || (t.is_non_overlapping_and_dense() && offset_of(t) == 0)) return t.clone();
  Tensor once = t;
  for (int64_t d = 0; d < t.dim(); d++)
    if (t.size(d) > 1 && t.stride(d) == 0) once = once.narrow(d, 0, 1);
  int64_t aligned = t.is_cpu() ? aligned_bytes : aligned_bytes_elsewhere, size = t.element_size();
  int64_t span = once.numel() ? 1 : 0;
  for (int64_t d = 0; d < once.dim() && once.numel(); d++) span += (once.size(d) - 1) * once.stride(d);
  Tensor room = t.new_empty({span + aligned / size});
  int64_t first = (offset_of(t) - offset_of(room) + aligned) % aligned / size;
  return room.as_strided(once.sizes(), once.strides(), first).copy_(once).expand(t.sizes());
}

// Return how often a tensor was written to; inference tensors do not count.
inline int64_t version_of(const Tensor& t) {
  return t.is_inference() ? 0 : int64_t(t.unsafeGetTensorImpl()->version_counter().current_version());
}

// Return a tensor without its history, which counts writes together with the original: `dispatch.alias`.
inline Tensor alias_of(const Tensor& t) {
  c10::impl::ForceDispatchKeyGuard above_autograd(INCLUDED, EXCLUDED);
  return t.detach();
}

// Return whether two tensors are the same elements of the same memory, as a detached tensor and its original.
inline bool is_alias(const Tensor& a, const Tensor& b) {
  if (!a.defined() || a.dtype() != b.dtype() || !is_strided(a) || !is_strided(b)) return false;
  if (a.is_conj() != b.is_conj() || a.is_neg() != b.is_neg() || a.device() != b.device()) return false;
  return a.const_data_ptr() == b.const_data_ptr() && a.sizes() == b.sizes() && a.strides() == b.strides();
}

// Return a value as handlers in Python have it: numbers in the place of tensors are numbers.
inline IValue plain(const IValue& v) {
  if (!v.isTensor()) return v;
  const Tensor& t = v.toTensor();
  if (!t.defined()) return IValue();
  if (!is_wrapped(t)) return v;
  switch (t.scalar_type()) {
    case at::kLong: return *t.const_data_ptr<int64_t>();
    case at::kDouble: return *t.const_data_ptr<double>();
    case at::kBool: return *t.const_data_ptr<bool>();
    case at::kComplexDouble: return *t.const_data_ptr<c10::complex<double>>();
    default: return v;
  }
}

// Return whether two values are equal and of one type: 1 and 1.0 are not.
inline bool is_equal(const IValue& constant, const IValue& v) {
  if (constant.isNone()) return v.isNone() || (v.isTensor() && !v.toTensor().defined());
  if (is_tensor(v)) return false;
  return v.isTensor() ? is_equal(constant, plain(v)) : constant == v;
}

inline py::object python_object(const IValue& v, const c10::Argument& argument) {
  if (v.isInt()) {
    switch (required(argument.real_type())->kind()) {
      case c10::TypeKind::ScalarTypeType: return py::cast(at::ScalarType(v.toInt()));
      case c10::TypeKind::LayoutType: return py::cast(at::Layout(v.toInt()));
      case c10::TypeKind::MemoryFormatType: return py::cast(at::MemoryFormat(v.toInt()));
      default: break;
    }
  }
  return torch::jit::toPyObject(plain(v));
}

// Return the arguments of an operator as handlers in Python have them: trailing defaults are left out.
inline std::pair<py::tuple, py::dict> python_arguments(const c10::FunctionSchema& schema, Arguments given) {
  py::list args;
  py::dict kwargs;
  auto is_default = [&](size_t i) {
    const auto& value = schema.arguments()[i].default_value();
    return value.has_value() && is_equal(*value, given[i]);
  };
  size_t count = 0;
  while (count < given.size() && !schema.arguments()[count].kwarg_only()) count++;
  for (size_t i = count; i < given.size(); i++)
    if (!is_default(i)) kwargs[py::str(schema.arguments()[i].name())] = python_object(given[i], schema.arguments()[i]);
  while (count > 0 && is_default(count - 1)) count--;
  for (size_t i = 0; i < count; i++) args.append(python_object(given[i], schema.arguments()[i]));
  return {py::tuple(args), kwargs};
}

// An object of Python that may be let go on any thread, even if it outlives Python.
using Shared = std::shared_ptr<PyObject>;

inline Shared share(py::object object) {
  return Shared(object.release().ptr(), [](PyObject* o) {
    if (!Py_IsInitialized()) return;
    py::gil_scoped_acquire gil;
    Py_DECREF(o);
  });
}

// Show operators that run inside to the `level` outermost observers only, without the keys that are excluded.
struct Under {
  inline static thread_local size_t visible = SIZE_MAX;
  size_t before = visible;
  c10::impl::ExcludeDispatchKeyGuard guard;
  explicit Under(DispatchKeySet excluded, size_t level = 0) : guard(level ? excluded.remove(KEY) : excluded) {
    visible = level;
  }
  ~Under() { visible = before; }
};

// --- matches
struct Layout {
  int64_t slot;
  std::vector<int64_t> shape, stride;
  int64_t offset;
  at::ScalarType dtype;
  at::Device device;
};

// Notes of a forward while its operators are compared with those of a unit: see match.py.
struct Match {
  // Weak references to results keep their addresses from being used again. Autograd would copy a view that is held.
  std::vector<WeakTensor> made;
  std::vector<std::pair<int64_t, WeakTensor>> again;
  std::vector<std::pair<TensorImpl*, int64_t>> slots;  // of results, the newest last
  std::vector<Tensor> external;
  std::vector<int64_t> versions;  // of external tensors, when they appeared
  std::vector<IValue> numbers;
  std::vector<std::pair<at::Generator, Tensor>> states;
  std::vector<std::pair<int64_t, Tensor>> held, alive;
  std::vector<Layout> layouts;

  explicit Match(const Unit& unit)
      : made(unit.slots, WeakTensor(c10::intrusive_ptr<TensorImpl, c10::UndefinedTensorImpl>())),
        external(unit.slots), versions(unit.slots), numbers(unit.numbers) {}

  int64_t slot(const Tensor& t) const {
    for (auto known = slots.rbegin(); known != slots.rend(); ++known)
      if (known->first == t.unsafeGetTensorImpl()) return known->second;
    return -1;
  }

  // Return whether a tensor is a result, or an alias of one.
  bool is_made(int64_t slot, const Tensor& t) const {
    auto is_one = [&t](const WeakTensor& name) {
      return name._unsafe_get_target() == t.unsafeGetTensorImpl() || is_alias(Tensor(name.lock()), t);
    };
    return is_one(made[slot]) || std::any_of(again.begin(), again.end(), [&](const auto& other) {
             return other.first == slot && is_one(other.second);
           });
  }

  // Compare the arguments of an operator before it runs, and note external tensors and numbers.
  bool take_arguments(const Operator& op, Arguments given) {
    for (size_t i = 0; i < given.size(); i++)
      if (!take_argument(op.arguments[i], given[i])) return false;
    return true;
  }

  bool take_argument(const Argument& a, const IValue& v) {
    switch (a.kind) {
      case Argument::MADE:
        return is_tensor(v) && is_made(a.index, v.toTensor());
      case Argument::EXTERNAL:
        if (!is_tensor(v)) return false;
        return external[a.index].unsafeGetTensorImpl() == v.unsafeToTensorImpl() ||
               is_alias(external[a.index], v.toTensor());
      case Argument::FIRST_EXTERNAL:
        if (!is_tensor(v)) return false;
        external[a.index] = v.toTensor();
        versions[a.index] = version_of(v.toTensor());
        if (a.shape && v.toTensor().sizes() != *a.shape) return false;
        return !a.has_layout || note_layout(a.index, v.toTensor());
      case Argument::NUMBER:
        if (is_tensor(v)) return false;
        numbers[a.index] = plain(v);
        return true;
      case Argument::CONSTANT:
        return is_equal(a.constant, v);
      case Argument::ANY:
        return true;
      case Argument::LIST:
        break;
    }
    if (!v.isList() || v.toListRef().size() != a.items.size()) return false;
    for (size_t i = 0; i < a.items.size(); i++)
      if (!take_argument(a.items[i], v.toListRef()[i])) return false;
    return true;
  }

  // Note the random state, and tensors that are written to later, before the operator runs.
  void note_before(const Operator& op, Arguments given) {
    if (!op.draws && op.cloned.empty()) return;
    Under here(ABOVE);
    if (op.draws) note_state(given);
    for (int64_t slot : op.cloned) held.emplace_back(slot, copy_of(external[slot]));
  }

  // As `state_before` of randomness.py.
  void note_state(Arguments given) {
    at::Generator generator;
    std::optional<at::Device> device, place;
    for (const IValue& v : given) {
      if (v.isGenerator()) generator = v.toGenerator();
      if (v.isDevice()) device = v.toDevice();
      if (!place && is_tensor(v)) place = v.toTensor().device();
    }
    if (!generator.defined())
      generator = at::globalContext().defaultGenerator(device ? *device : place.value_or(at::Device(at::kCPU)));
    std::lock_guard<std::mutex> lock(generator.mutex());
    states.emplace_back(generator, generator.get_state());
  }

  // Copy the tensors that are held in memory that is about to be written to, as operators read them before.
  void copy_held(const Unit& unit, const void* memory) {
    Under here(ABOVE);
    std::vector<std::pair<int64_t, Tensor>> copies;
    for (int64_t slot : unit.read)
      if (memory_of(external[slot]) == memory) copies.emplace_back(slot, external[slot]);
    for (auto* kept : {&held, &alive})
      for (auto& [slot, t] : *kept) {
        if (memory_of(t) == memory) t = copy_of(t);
        if (kept == &held)
          copies.erase(std::remove_if(copies.begin(), copies.end(), [s = slot](const auto& c) { return c.first == s; }),
                       copies.end());
      }
    for (const auto& [slot, t] : copies) held.emplace_back(slot, copy_of(t));
  }

  // Compare the results of an operator, and note them.
  bool take_results(const Operator& op, const Stack& stack) {
    Arguments results = torch::jit::last(stack, op.handle.schema().returns().size());
    if (!op.is_single && results.size() == 1 && results[0].isList()) results = results[0].toListRef();
    if (!op.results.empty() && results.size() != op.results.size()) return false;
    for (size_t i = 0; i < op.results.size(); i++)
      if (op.results[i].kind != Result::IGNORED && !take_result(op.results[i], results[i])) return false;
    for (const auto& [first, slot] : op.rewritten) {
      Tensor t(made[first].lock());
      if (!t.defined()) return false;
      hold(held, slot, t, Result::ALIAS);
    }
    return true;
  }

  bool take_result(const Result& r, const IValue& v) {
    if (!v.isTensor() || !v.toTensor().defined()) return false;
    const Tensor& t = v.toTensor();
    if (r.kind == Result::EXTERNAL) {
      external[r.slot] = t;
      return true;
    }
    if (r.kind == Result::AGAIN) {
      again.emplace_back(r.slot, t.getIntrusivePtr());
      slots.emplace_back(t.unsafeGetTensorImpl(), r.slot);
      return true;
    }
    if (r.shape && t.sizes() != *r.shape) return false;
    made[r.slot] = WeakTensor(t.getIntrusivePtr());
    slots.emplace_back(t.unsafeGetTensorImpl(), r.slot);
    if (r.held != Result::NONE) hold(held, r.slot, t, r.held);
    if (r.alive != Result::NONE) hold(alive, r.slot, t, r.alive);
    return !r.has_layout || note_layout(r.slot, t);
  }

  bool note_layout(int64_t slot, const Tensor& t) {
    if (!is_strided(t)) return false;
    layouts.push_back({slot, t.sizes().vec(), t.strides().vec(), offset_of(t), t.scalar_type(), t.device()});
    return true;
  }

  static void hold(std::vector<std::pair<int64_t, Tensor>>& kept, int64_t slot, const Tensor& t, Result::Hold how) {
    Under here(ABOVE);
    if (how == Result::ALIAS) {
      kept.emplace_back(slot, alias_of(t));
    } else if (how == Result::COPY) {
      kept.emplace_back(slot, copy_of(t));
    } else {
      kept.emplace_back(slot, how == Result::DETACH ? t.detach() : t);
    }
  }
};
}  // namespace revfx
