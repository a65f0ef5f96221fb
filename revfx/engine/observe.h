// Observers of the operators of a thread: see watch.cpp for their place.
#pragma once

#include <torch/csrc/Exceptions.h>

#include "watch.h"

namespace revfx {
// Call into Python from an operator. The `level` outermost observers see the operators that run there. An error becomes
// one of torch's own, so that it reaches the user's call unchanged.
template <class Function>
void call_python(size_t level, const Function& function) {
  Under here(ABOVE, level);
  py::gil_scoped_acquire gil;
  try {
    function();
  } catch (py::error_already_set& e) {
    e.restore();
    python_error error;
    error.persist();
    throw error;
  }
}

// Something that sees the operators of a thread while it is entered.
class Observer {
 public:
  virtual ~Observer() = default;
  virtual void see(const OperatorHandle& op, DispatchKeySet keys, Stack* stack, size_t level) = 0;

  static void enter(std::shared_ptr<Observer> self) {
    active.push_back(std::move(self));
    c10::impl::tls_set_dispatch_key_included(KEY, true);
  }

  virtual void exit() {
    for (size_t i = active.size(); i-- > 0;)
      if (active[i].get() == this) active.erase(active.begin() + std::ptrdiff_t(i));  // the caller holds it
    if (active.empty()) c10::impl::tls_set_dispatch_key_included(KEY, false);
  }

  bool is_here() const {
    return std::any_of(active.begin(), active.end(), [this](const auto& other) { return other.get() == this; });
  }

  inline static thread_local std::vector<std::shared_ptr<Observer>> active;  // of this thread, the innermost last

 protected:
  static Arguments arguments(const OperatorHandle& op, const Stack& stack) {
    return torch::jit::last(stack, op.schema().arguments().size());
  }
};

// Run an operator under the `level` outermost observers.
inline void run(const OperatorHandle& op, DispatchKeySet keys, Stack* stack, size_t level) {
  level = std::min(level, Observer::active.size());
  if (level > 0) {
    std::shared_ptr<Observer> observer = Observer::active[level - 1];
    observer->see(op, keys, stack, level - 1);
    return;
  }
  Under here{DispatchKeySet(KEY)};
  op.redispatchBoxed(keys & DispatchKeySet(DispatchKeySet::FULL_AFTER, KEY), stack);
}

// A handler in Python, as a dispatch mode has it: it runs the operators.
class Handler : public Observer {
 public:
  explicit Handler(py::object handle) : handle_(share(std::move(handle))) {}

  void see(const OperatorHandle& op, DispatchKeySet, Stack* stack, size_t level) override {
    const auto& schema = op.schema();
    call_python(level, [&] {
      auto [args, kwargs] = python_arguments(schema, arguments(op, *stack));
      py::object out = py::handle(handle_.get())(schema.name(), schema.overload_name(), args, kwargs);
      torch::jit::drop(*stack, schema.arguments().size());
      const auto& returns = schema.returns();
      for (size_t i = 0; i < returns.size(); i++) {
        py::object result = returns.size() == 1 ? out : py::object(out[py::int_(i)]);
        stack->push_back(torch::jit::toIValue(result, returns[i].type()));
      }
    });
    // torch makes objects of subclasses for results of these two: they must not have an object in Python already.
    if (schema.name() == "aten::alias" || schema.name() == "aten::detach")
      stack->back() = Tensor(stack->back().toTensor().unsafeGetTensorImpl()->shallow_copy_and_detach(
          c10::VariableVersion(0), /*allow_tensor_metadata_change=*/true));
  }

 private:
  Shared handle_;
};
}  // namespace revfx
