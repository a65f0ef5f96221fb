// Replays, run natively: a graph as steps over registers. See replaying.py, which describes them.
#pragma once

#include <ATen/ScalarOps.h>
#include <torch/csrc/Exceptions.h>

#include "watch.h"

namespace revfx {
// Return an object as an argument of an operator: a number in the place of a tensor is one that does not promote.
inline IValue argument_of(py::handle object, const c10::TypePtr& type) {
  IValue v = constant_of(object, type);
  if (required(type)->kind() != c10::TypeKind::TensorType || !v.isScalar()) return v;
  Tensor t = c10::scalar_to_tensor(v.toScalar());
  t.unsafeGetTensorImpl()->set_wrapped_number(true);
  return t;
}

// A value of a replay: a value of torch, or an object that a function of Python gives or takes.
struct Register {
  IValue value;
  py::object object;

  py::object python() const { return object ? object : torch::jit::toPyObject(value); }
};

class Replay {
 public:
  // `tensors`: which inputs are tensors.
  Replay(size_t registers, std::vector<bool> tensors) : registers_(registers), tensors_(std::move(tensors)) {}

  // Add an operator. An argument is None for its default, or a kind with its value.
  void add_operator(const std::string& name, const std::string& overload, const py::list& arguments, size_t out,
                    std::vector<size_t> freed) {
    auto handle = c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), overload.c_str());
    const auto& expected = handle.schema().arguments();
    TORCH_CHECK(expected.size() == arguments.size(), name, " has other arguments");
    Step step{Step::OPERATOR, handle, {}, {}, 0, out, std::move(freed)};
    for (size_t i = 0; i < expected.size(); i++) {
      if (arguments[i].is_none()) {
        TORCH_CHECK(expected[i].default_value().has_value(), "an argument without a default is missing");
        step.operands.push_back({Operand::CONSTANT, 0, *expected[i].default_value(), {}, {}, {}});
      } else {
        step.operands.push_back(operand(arguments[i], expected[i].type()));
      }
    }
    steps_.push_back(std::move(step));
  }

  // Add a call of a function in Python.
  void add_function(py::object function, const py::list& arguments, size_t out, std::vector<size_t> freed) {
    Step step{Step::FUNCTION, {}, std::move(function), {}, 0, out, std::move(freed)};
    for (py::handle a : arguments) step.operands.push_back(operand(a, nullptr));
    steps_.push_back(std::move(step));
  }

  // Add the choice of one of an operator's results.
  void add_item(size_t from, size_t position, size_t out, std::vector<size_t> freed) {
    Step step{Step::ITEM, {}, {}, {}, position, out, std::move(freed)};
    step.operands.push_back({Operand::REGISTER, from, {}, {}, {}, {}});
    steps_.push_back(std::move(step));
  }

  void returns(std::vector<size_t> registers) { returned_ = std::move(registers); }

  // Run all steps. The list of inputs is emptied, and each register once nothing reads it any more.
  py::tuple run(const py::list& inputs) const {
    std::vector<Register> registers(registers_);
    for (size_t i = 0; i < tensors_.size(); i++) {
      py::object given = inputs[i];
      if (tensors_[i]) {
        registers[i].value = given.cast<Tensor>();
      } else {
        registers[i].object = std::move(given);
      }
    }
    PyList_SetSlice(inputs.ptr(), 0, PyList_GET_SIZE(inputs.ptr()), nullptr);
    for (const Step& step : steps_) {
      step.run(registers);
      for (size_t r : step.freed) registers[r] = {};
    }
    py::tuple results(returned_.size());
    for (size_t i = 0; i < returned_.size(); i++) results[i] = registers[returned_[i]].python();
    return results;
  }

 private:
  struct Operand {
    enum Kind { CONSTANT, REGISTER, LIST } kind;
    size_t index;
    IValue constant;
    py::object object;  // the constant, for functions of Python
    std::vector<Operand> items;
    c10::TypePtr type;

    py::object python(const std::vector<Register>& registers) const {
      if (kind == REGISTER) return registers[index].python();
      if (kind == CONSTANT) return object;
      py::list found;
      for (const Operand& item : items) found.append(item.python(registers));
      return found;
    }

    IValue value(const std::vector<Register>& registers) const {
      if (kind == CONSTANT) return constant;
      if (kind == REGISTER)
        return registers[index].object ? argument_of(registers[index].object, type) : registers[index].value;
      bool are_tensors = required(type)->expectRef<c10::ListType>().getElementType()->kind() == c10::TypeKind::TensorType;
      if (!are_tensors) return torch::jit::toIValue(python(registers), type);
      c10::List<Tensor> found;
      for (const Operand& item : items) found.push_back(item.value(registers).toTensor());
      return found;
    }
  };

  struct Step {
    enum Kind { OPERATOR, FUNCTION, ITEM } kind;
    std::optional<OperatorHandle> handle;
    py::object function;
    std::vector<Operand> operands;
    size_t position;
    size_t out;
    std::vector<size_t> freed;

    void run(std::vector<Register>& registers) const {
      if (kind == ITEM) {
        const Register& whole = registers[operands[0].index];
        if (whole.object) {
          registers[out].object = whole.object[py::int_(position)];
        } else if (whole.value.isTuple()) {
          registers[out].value = whole.value.toTupleRef().elements()[position];
        } else {
          registers[out].value = whole.value.toListRef()[position];
        }
      } else if (kind == FUNCTION) {
        py::tuple arguments(operands.size());
        for (size_t i = 0; i < operands.size(); i++) arguments[i] = operands[i].python(registers);
        registers[out].object = function(*arguments);
      } else {
        Stack stack;
        stack.reserve(operands.size());
        for (const Operand& o : operands) stack.push_back(o.value(registers));
        try {
          py::gil_scoped_release no_gil;
          handle->callBoxed(stack);
        } catch (...) {
          torch::translate_exception_to_python(std::current_exception());
          throw py::error_already_set();
        }
        if (stack.size() == 1) {
          registers[out].value = std::move(stack[0]);
        } else {
          registers[out].value = c10::ivalue::Tuple::create(std::move(stack));
        }
      }
    }
  };

  static Operand operand(py::handle described, const c10::TypePtr& type) {
    auto [kind, value] = described.cast<std::pair<int, py::object>>();
    Operand o{Operand::Kind(kind), 0, {}, {}, {}, type};
    if (o.kind == Operand::REGISTER) {
      o.index = value.cast<size_t>();
    } else if (o.kind == Operand::LIST) {
      auto item_type = type ? required(type)->expectRef<c10::ListType>().getElementType() : nullptr;
      for (py::handle item : value) o.items.push_back(operand(item, item_type));
    } else {
      o.object = value;
      if (type) o.constant = argument_of(value, type);
    }
    return o;
  }

  size_t registers_;
  std::vector<bool> tensors_;
  std::vector<Step> steps_;
  std::vector<size_t> returned_;
};
}  // namespace revfx
