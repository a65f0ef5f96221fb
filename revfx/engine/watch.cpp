// The native watcher: it compares the operators of a forward with the units of a plan, as watch.py and checkers.py do.
//
// Its place is a boxed fallback on DispatchKey::Fake. In torch 2.13 this is the one key that lies below autograd and
// above BackendSelect, and that nothing else has registered. The alternatives:
// - at::RecordFunction fires at every level, above autograd too, and gives no inputs of linear, expand, copy_ and more.
// - The other keys between autograd and BackendSelect (Python, Functionalize, Negative, ...) have fallbacks of torch.
// - Keys from BackendSelect downwards don't see factories: these have no tensor among their arguments.
// The key is in a thread's include set while an observer is entered there, and excluded while an operator runs.
#include <ATen/SavedTensorHooks.h>
#include <torch/csrc/autograd/function.h>

#include "observe.h"
#include "replay.h"
#include "saved.h"

#include <unordered_map>
#include <unordered_set>

namespace {
using namespace revfx;

py::handle tensor_type, parameter_type;         // `torch.Tensor` and `nn.Parameter`
py::handle held_tensor_type;                    // `HeldTensor` of match.py
std::unordered_set<OperatorHandle> statistics;  // normalizations: their writes to running statistics don't count

// A match that is being continued, with its unit and saved tensors.
struct Running {
  size_t number;  // of the unit in the plan
  int64_t first;  // the number of the operator with which it began
  size_t at = 0;  // the number of operators that matched
  Match match;
  Shared saved{};  // a list of saved tensors with their slots, once there are any
};

py::int_ number_of(const void* pointer) { return py::int_(reinterpret_cast<uintptr_t>(pointer)); }

// A match with Python's objects: the interface of match.py.
struct PythonMatch {
  py::object of;
  int64_t first;
  Match match;
  py::list saved, numbers, states;
  py::dict held, alive, layouts;

  PythonMatch(py::object of, Running&& running)
      : of(std::move(of)), first(running.first), match(std::move(running.match)) {
    if (running.saved) saved = py::reinterpret_borrow<py::list>(running.saved.get());
    for (const IValue& v : match.numbers) numbers.append(torch::jit::toPyObject(v));
    for (const auto& [generator, state] : match.states) states.append(py::make_tuple(generator, state));
    for (const auto& [slot, t] : match.held) held[py::int_(slot)] = t;
    for (const auto& [slot, t] : match.alive) alive[py::int_(slot)] = t;
    for (const Layout& l : match.layouts)
      layouts[py::int_(l.slot)] =
          py::make_tuple(py::tuple(py::cast(l.shape)), py::tuple(py::cast(l.stride)), l.offset, l.dtype, l.device);
  }

  py::object given(int64_t slot) const {
    return match.external[slot].defined() ? py::cast(match.external[slot]) : py::none();
  }

  py::tuple hold(const std::vector<int64_t>& slots, const std::vector<int64_t>& entry) const {
    py::dict given, versions;
    py::set memory;
    for (int64_t slot : slots) {
      py::int_ key(slot);
      bool is_trained = false;
      Tensor t = match.external[slot];
      auto copy = std::find_if(match.held.rbegin(), match.held.rend(), [slot](auto& h) { return h.first == slot; });
      if (copy != match.held.rend()) {
        t = copy->second;
      } else if (!t.defined()) {
        continue;
      } else {
        is_trained = t.requires_grad() && t.is_leaf() && !std::count(entry.begin(), entry.end(), slot);
      }
      Tensor alias = alias_of(t);
      given[key] = alias;
      versions[key] = version_of(alias);
      if (!is_trained && memory_of(alias)) memory.add(number_of(memory_of(alias)));
    }
    return py::make_tuple(given, versions, memory);
  }

  py::list exits(const std::vector<int64_t>& slots, const std::vector<int64_t>& first_slots) const {
    py::list found;
    for (size_t i = 0; i < slots.size(); i++) {
      int64_t slot = slots[i];
      py::object object = py::cast(Tensor(match.made[first_slots[i]].lock()));
      if (object.is_none()) object = tensor(slot);
      auto t = object.cast<Tensor>();
      py::object at = is_strided(t) ? py::object(number_of(t.const_data_ptr())) : py::none();
      py::object memory = memory_of(t) ? py::object(number_of(memory_of(t))) : py::none();
      found.append(held_tensor_type(slot, object, alias_of(t), version_of(t), at, memory));
    }
    return found;
  }

  py::object version(int64_t slot) const {
    return match.external[slot].defined() ? py::cast(match.versions[slot]) : py::none();
  }

  py::object tensor(int64_t slot) const {
    if (match.external[slot].defined()) return py::cast(match.external[slot]);
    py::object t = py::cast(Tensor(match.made[slot].lock()));
    py::int_ key(slot);
    if (!t.is_none()) return t;
    return alive.contains(key) ? py::object(alive[key]) : held.contains(key) ? py::object(held[key]) : t;
  }

  py::object operand(int64_t slot) const {
    py::int_ key(slot);
    return held.contains(key) ? held[key] : alive.contains(key) ? py::object(alive[key]) : given(slot);
  }
};

// The units of a plan, each with its `UnitPlan`.
struct Plan {
  std::vector<std::pair<Shared, std::shared_ptr<Unit>>> units;
  std::vector<bool> may_fail, is_fallback;  // see `UnitPlan`
  std::unordered_map<OperatorHandle, std::vector<size_t>> starts;
  std::unordered_set<int64_t> dropped_at;  // see `Plan`; empty of a plan whose units may begin anywhere

  std::unordered_map<int64_t, std::vector<size_t>> others;  // of other ways of the forward: by the first operator

  void begin_at(int64_t operator_number, const py::object& unit_plan) {
    for (size_t i = 0; i < units.size(); i++)
      if (units[i].first.get() == unit_plan.ptr()) others[operator_number].push_back(i);
  }

  void drop_at(const std::vector<int64_t>& numbers) { dropped_at.insert(numbers.begin(), numbers.end()); }

  void add(py::object unit_plan, std::shared_ptr<Unit> unit) {
    starts[unit->operators.front().handle].push_back(units.size());
    may_fail.push_back(unit_plan.attr("may_fail").cast<bool>());
    is_fallback.push_back(unit_plan.attr("is_fallback").cast<bool>());
    units.emplace_back(share(std::move(unit_plan)), std::move(unit));
  }
};

// The watcher of one forward: see watch.py, which it follows step by step.
class Watcher : public Observer {
 public:
  Watcher(std::shared_ptr<Plan> plan, py::object forward, py::object saved_tensor, py::object is_wrapper,
          py::object saved_wrapper)
      : plan_(std::move(plan)),
        forward_(share(std::move(forward))),
        saved_tensor_(share(std::move(saved_tensor))),
        is_wrapper_(share(std::move(is_wrapper))),
        saved_wrapper_(share(std::move(saved_wrapper))) {
    look_ahead();
  }

  // Begin, with the hooks for saved tensors set.
  void begin() {
    depth_ = at::SavedTensorDefaultHooks::get_tls_state().stack.size();
    choose_hooks();
  }

  // Let no unit begin any more; tensors that earlier ones hold are still protected from writes.
  void stop() { has_stopped_ = true; }

  void exit() override {
    Observer::exit();
    running_.clear();
    if (hooks_) set_hooks();
  }

  // Return the object that autograd holds in the place of a tensor.
  py::object pack(py::handle tensor) {
    Under here{DispatchKeySet(KEY)};
    if (!is_here()) return forward().attr("save")(tensor);
    const auto& t = tensor.cast<Tensor>();
    bool is_plain = py::type::handle_of(tensor).is(tensor_type) || py::type::handle_of(tensor).is(parameter_type);
    if (!is_plain && !t.is_nested() && py::handle(is_wrapper_.get())(py::type::handle_of(tensor)).cast<bool>()) {
      auto pack_part = py::cpp_function([this](py::handle part) { return pack(part); });
      return py::handle(saved_wrapper_.get())(tensor, pack_part);
    }
    py::object saved;
    if (is_plain) saved = py::cast(std::make_shared<Saved>(t));
    bool is_matched = false;
    for (Running& r : running_) {
      int64_t slot = r.match.slot(t);
      if (slot < 0) continue;
      if (!saved) saved = py::handle(saved_tensor_.get())(tensor);
      if (!r.saved) r.saved = share(py::list());
      py::reinterpret_borrow<py::list>(r.saved.get()).append(py::make_tuple(saved, unit(r).slot_at(slot, r.at)));
      is_matched = true;
    }
    if (!saved) return forward().attr("save")(tensor);
    if (!is_matched && is_plain && is_strided(t) && exits_.count(t.const_data_ptr()))
      forward().attr("drop_if_exit")(saved, tensor);
    return saved;
  }

  void see(const OperatorHandle& op, DispatchKeySet keys, Stack* stack, size_t level) override {
    following_ = ++number_;
    if (is_unsettled_) call_python(0, [&] { forward().attr("settle")(); });
    is_unsettled_ = false;
    before_write(op, *stack);
    if (running_.size() == 1 && next(running_[0]).handle == op) {
      follow(op, keys, stack, level);
    } else if (!running_.empty() || plan_->starts.count(op)) {
      advance(op, keys, stack, level);
    } else {
      run(op, keys, stack, level);
    }
    if (running_.empty() && expected_at_ >= 0 && number_ >= expected_at_) lose();
    choose_hooks();
  }

 private:
  // Have the hooks for saved tensors set only where the plan drops one: before the next operator, or after this one.
  // Elsewhere autograd keeps the tensor itself. Hooks that others have set since stay on top.
  void choose_hooks() {
    if (plan_->dropped_at.empty()) return;
    bool is_wanted = is_off_path_ || plan_->dropped_at.count(number_ + 1) > 0;
    if (is_wanted != bool(hooks_)) return;
    if (torch::autograd::get_current_node()) return;  // a backward inside, which restores this thread's hooks
    size_t size = at::SavedTensorDefaultHooks::get_tls_state().stack.size();
    if (is_wanted && size == depth_ - 1 && at::SavedTensorDefaultHooks::is_enabled()) set_hooks();
    if (!is_wanted && size == depth_) hooks_ = at::SavedTensorDefaultHooks::pop_hooks();
  }

  void set_hooks() {
    at::SavedTensorDefaultHooks::push_hooks(std::move(hooks_->first), std::move(hooks_->second));
    hooks_.reset();
  }

  py::handle forward() const { return forward_.get(); }
  const Unit& unit(const Running& r) const { return *plan_->units[r.number].second; }
  const Operator& next(const Running& r) const { return unit(r).operators[r.at]; }
  bool is_complete(const Running& r) const { return r.at == unit(r).operators.size(); }

  // Copy tensors that matches and calls hold in memory that an operator writes to.
  void before_write(const OperatorHandle& op, const Stack& stack) {
    if (!op.schema().is_mutable() || statistics.count(op)) return;
    std::vector<Tensor> written;
    for (size_t i = 0; i < op.schema().arguments().size(); i++) {
      const auto* alias = op.schema().arguments()[i].alias_info();
      const IValue& v = arguments(op, stack)[i];
      if (!alias || !alias->isWrite()) continue;
      if (is_tensor(v)) written.push_back(v.toTensor());
      if (v.isTensorList())
        for (const IValue& t : v.toListRef()) written.push_back(t.toTensor());
    }
    for (const Tensor& t : written)
      for (Running& r : running_)
        if (memory_of(t)) r.match.copy_held(unit(r), memory_of(t));
    if (!has_calls_) return;
    call_python(0, [&] {
      auto holders = forward().attr("holders").cast<py::dict>();
      bool is_held = std::any_of(written.begin(), written.end(),
                                 [&](const Tensor& t) { return holders.contains(number_of(memory_of(t))); });
      if (is_held) forward().attr("before_write")(py::cast(written), py::tuple());
    });
  }

  // Run the operator that the one match expects.
  void follow(const OperatorHandle& op, DispatchKeySet keys, Stack* stack, size_t level) {
    const Operator& expected = next(running_[0]);
    bool fits = running_[0].match.take_arguments(expected, arguments(op, *stack));
    if (fits) running_[0].match.note_before(expected, arguments(op, *stack));
    run_or_end(op, keys, stack, level);
    if (!is_here()) return;  // the kernel of the operator left the watcher
    if (!fits || !running_[0].match.take_results(expected, *stack)) {
      discard(0);
      return;
    }
    running_[0].at++;
    if (is_complete(running_[0])) complete(0);
  }

  // Run an operator that goes on with several matches, ends some, or begins others.
  void advance(const OperatorHandle& op, DispatchKeySet keys, Stack* stack, size_t level) {
    for (size_t i = running_.size(); i-- > 0;)
      if (!(next(running_[i]).handle == op)) discard(i);
    std::vector<bool> fits;
    for (Running& r : running_) fits.push_back(r.match.take_arguments(next(r), arguments(op, *stack)));
    std::vector<Running> starting;
    for (size_t number : candidates(op)) {
      Running r{number, number_, 0, Match(*plan_->units[number].second)};
      if (r.match.take_arguments(next(r), arguments(op, *stack))) starting.push_back(std::move(r));
    }
    for (size_t i = 0; i < fits.size(); i++)
      if (fits[i]) running_[i].match.note_before(next(running_[i]), arguments(op, *stack));
    for (Running& r : starting) r.match.note_before(next(r), arguments(op, *stack));
    run_or_end(op, keys, stack, level);
    if (!is_here()) return;
    for (size_t i = running_.size(); i-- > 0;) {
      if (fits[i] && running_[i].match.take_results(next(running_[i]), *stack)) {
        running_[i].at++;
      } else {
        discard(i);
      }
    }
    for (Running& r : starting) {
      if (!r.match.take_results(next(r), *stack) || !may_begin(r)) continue;
      r.at = 1;
      running_.push_back(std::move(r));
    }
    finish();
  }

  void run_or_end(const OperatorHandle& op, DispatchKeySet keys, Stack* stack, size_t level) {
    try {
      run(op, keys, stack, level);
      following_ = number_ + 1;
    } catch (...) {  // it may have written to some of its arguments
      while (!running_.empty()) discard(running_.size() - 1, false);
      throw;
    }
  }

  // Return the units that may begin with an operator: the expected one, others if it is not running.
  std::vector<size_t> candidates(const OperatorHandle& op) {
    auto known = plan_->starts.find(op);
    if (has_stopped_ || known == plan_->starts.end()) return {};
    bool begins = std::count(known->second.begin(), known->second.end(), expected_) > 0;
    bool is_running =
        std::any_of(running_.begin(), running_.end(), [this](const Running& r) { return r.number == expected_; });
    if (expected_at_ >= 0 && !is_off_path_) {
      if (number_ < expected_at_ || begins || is_running) return of_ways(known->second);
      lose();
      if (!is_off_path_) return candidates(op);
    }
    if (expected_at_ >= 0) return fallback(known->second);
    if (has_varied_ || (running_.empty() && !begins)) return known->second;
    return begins && !is_running ? std::vector<size_t>{expected_} : std::vector<size_t>{};
  }

  // Return the expected unit, if it begins now, and those of other ways that do.
  std::vector<size_t> of_ways(const std::vector<size_t>& starting) const {
    std::vector<size_t> found;
    if (number_ == expected_at_) found.push_back(expected_);
    auto others = plan_->others.find(number_);
    if (others == plan_->others.end()) return found;
    for (size_t number : others->second)
      if (!std::count(found.begin(), found.end(), number) && std::count(starting.begin(), starting.end(), number))
        found.push_back(number);
    return found;
  }

  // Note that the forward left the way that it went; go on with another one, if there is one.
  void lose() {
    if (is_off_path_) return;
    is_off_path_ = true;
    if (expected_at_ < 0) return;
    call_python(0, [&] {
      int64_t from = running_.empty() ? following_ : running_.front().first;
      if (!forward().attr("switch_path")(from).cast<bool>()) return;
      is_off_path_ = false;
      look_ahead();
    });
  }

  // Return the units that may begin where the forward went another way than the ones that were learnt.
  std::vector<size_t> fallback(const std::vector<size_t>& starting) const {
    std::vector<size_t> found;
    for (size_t number : starting)
      if (running_.empty() && plan_->is_fallback[number]) found.push_back(number);
    return found;
  }

  bool may_begin(const Running& r) const {
    if (r.number == expected_ || unit(r).drops) return true;
    bool may = false;
    call_python(0, [&] { may = forward().attr("may_begin")(python_match(Running(r))).cast<bool>(); });
    return may;
  }

  // Complete the match that has come to its end, unless that of the expected unit is still running. If that one failed
  // before, another one counts instead, which drops something.
  void finish() {
    size_t none = running_.size(), first = none, dropping = none, expected = none;
    for (size_t i = running_.size(); i-- > 0;) {
      if (is_complete(running_[i])) first = i;
      if (is_complete(running_[i]) && unit(running_[i]).drops) dropping = i;
      if (running_[i].number == expected_) expected = i;
    }
    if (first == none) return;
    size_t chosen = expected == none ? first : expected;
    bool waits = is_complete(running_[chosen]) || !plan_->may_fail[running_[chosen].number];
    if (!waits && dropping != none) chosen = dropping;
    if (is_complete(running_[chosen])) {
      complete(chosen);
      return;
    }
    for (size_t i = running_.size(); i-- > 0;)
      if (is_complete(running_[i])) discard(i);
  }

  void complete(size_t chosen) {
    Running complete = std::move(running_[chosen]);
    running_.erase(running_.begin() + std::ptrdiff_t(chosen));
    while (!running_.empty()) discard(running_.size() - 1);
    call_python(0, [&] {
      forward().attr("complete")(python_match(std::move(complete)));
      is_unsettled_ = !forward().attr("unsettled").is_none();
      has_calls_ = true;
      for (py::handle address : forward().attr("addresses"))
        exits_.insert(reinterpret_cast<const void*>(address.cast<uintptr_t>()));
      look_ahead();
    });
  }

  void discard(size_t i, bool differs = true) {
    Running r = std::move(running_[i]);
    running_.erase(running_.begin() + std::ptrdiff_t(i));
    differs = differs && r.number == expected_ && r.at > 1;
    if (!differs) return;
    lose();
    if (expected_at_ >= 0) return;
    call_python(0, [&] {
      forward().attr("plan").attr("has_varied") = py::bool_(true);
      py::handle(plan_->units[r.number].first.get()).attr("may_fail") = py::bool_(true);
    });
    has_varied_ = plan_->may_fail[r.number] = true;
  }

  py::object python_match(Running&& r) const {
    auto of = py::reinterpret_borrow<py::object>(plan_->units[r.number].first.get());
    return py::cast(std::make_unique<PythonMatch>(std::move(of), std::move(r)));
  }

  // Note the unit that comes next.
  void look_ahead() {
    has_varied_ = forward().attr("plan").attr("has_varied").cast<bool>();
    py::object unit_plan = forward().attr("expected");
    expected_at_ = forward().attr("expected_at").cast<int64_t>();
    for (expected_ = 0; expected_ < plan_->units.size(); expected_++)
      if (plan_->units[expected_].first.get() == unit_plan.ptr()) return;
  }

  std::shared_ptr<Plan> plan_;
  Shared forward_, saved_tensor_, is_wrapper_, saved_wrapper_;  // classes, and a function, of Python
  std::vector<Running> running_;
  size_t expected_ = 0;  // the number of the unit that comes next
  int64_t number_ = -1;        // of the operator that runs
  int64_t expected_at_ = -1;   // the number of the operator at which that unit begins; -1 of any
  int64_t following_ = 0;      // the number of the operator with which units may begin
  bool has_stopped_ = false;   // no unit begins any more
  bool is_off_path_ = false;   // the forward is like none that was learnt: units may begin anywhere
  bool has_varied_ = false;    // of the plan
  size_t depth_ = 0;  // how many hooks for saved tensors are set, with those of this watcher
  std::optional<std::pair<c10::SafePyObject, c10::SafePyObject>> hooks_;  // them, while they are not set
  bool is_unsettled_ = false;  // see `Forward`
  bool has_calls_ = false;     // units matched
  std::unordered_set<const void*> exits_;           // addresses of the exits of calls
};

void watch(const OperatorHandle& op, DispatchKeySet keys, Stack* stack) {
  // torch excludes Python for operators that no dispatch mode shall see, as in torch.tensor, and includes Meta for
  // those of fake tensors.
  bool is_hidden = c10::impl::tls_is_dispatch_key_excluded(DispatchKey::Python) ||
                   c10::impl::tls_is_dispatch_key_included(DispatchKey::Meta);
  run(op, keys, stack, is_hidden ? 0 : std::min(Under::visible, Observer::active.size()));
}

// Return a saved tensor; a backward inside of a forward may have it replayed.
py::object unpack(py::handle saved) {
  Under here{DispatchKeySet(KEY)};
  return py::isinstance<Saved>(saved) ? saved.cast<Saved&>().get() : saved.attr("get")();
}

void install(int64_t aligned, int64_t aligned_elsewhere, py::handle tensor, py::handle parameter, py::handle held_tensor,
             const std::vector<std::pair<std::string, std::string>>& normalizations) {
  auto& dispatcher = c10::Dispatcher::singleton();
  if (dispatcher.hasBackendFallbackForDispatchKey(KEY) || !dispatcher.getRegistrationsForDispatchKey(KEY).empty())
    throw std::runtime_error(std::string("the dispatch key ") + c10::toString(KEY) + " is taken");
  aligned_bytes = aligned, aligned_bytes_elsewhere = aligned_elsewhere;
  tensor_type = tensor.inc_ref(), parameter_type = parameter.inc_ref();
  held_tensor_type = held_tensor.inc_ref();
  for (const auto& [name, overload] : normalizations)
    statistics.insert(dispatcher.findSchemaOrThrow(name.c_str(), overload.c_str()));
  // For as long as the process lasts: operators may run while it ends.
  static auto* fallback = new c10::RegistrationHandleRAII(
      dispatcher.registerFallback(KEY, c10::KernelFunction::makeFromBoxedFunction<&watch>(), "revfx"));
  (void)fallback;
}
}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("install", &install);
  m.def("unpack", &unpack);
  py::class_<Unit, std::shared_ptr<Unit>>(m, "Unit", py::module_local())
      .def(py::init<int64_t, int64_t, bool, std::vector<Renamed>, std::vector<int64_t>>())
      .def("add", &Unit::add);
  py::class_<Plan, std::shared_ptr<Plan>>(m, "Plan", py::module_local())
      .def(py::init<>())
      .def("add", &Plan::add)
      .def("begin_at", &Plan::begin_at)
      .def("drop_at", &Plan::drop_at);
  py::class_<Replay>(m, "Replay", py::module_local())
      .def(py::init<size_t, std::vector<bool>>())
      .def("add_operator", &Replay::add_operator)
      .def("add_function", &Replay::add_function)
      .def("add_item", &Replay::add_item)
      .def("returns", &Replay::returns)
      .def("run", &Replay::run);
  py::class_<Saved, std::shared_ptr<Saved>>(m, "Saved", py::module_local())
      .def_property_readonly("tensor", &Saved::kept)
      .def_readonly("version", &Saved::version)
      .def("drop", &Saved::drop)
      .def("get", &Saved::get);
  py::class_<PythonMatch>(m, "Match", py::module_local())
      .def_readonly("of", &PythonMatch::of)
      .def_readonly("first", &PythonMatch::first)
      .def_readonly("saved", &PythonMatch::saved)
      .def_readonly("numbers", &PythonMatch::numbers)
      .def_readonly("states", &PythonMatch::states)
      .def_readonly("held", &PythonMatch::held)
      .def_readonly("alive", &PythonMatch::alive)
      .def_readonly("layouts", &PythonMatch::layouts)
      .def("given", &PythonMatch::given)
      .def("hold", &PythonMatch::hold)
      .def("exits", &PythonMatch::exits)
      .def("version", &PythonMatch::version)
      .def("tensor", &PythonMatch::tensor)
      .def("operand", &PythonMatch::operand);
  py::class_<Observer, std::shared_ptr<Observer>>(m, "Observer", py::module_local())
      .def("enter", &Observer::enter)
      .def("exit", &Observer::exit);
  py::class_<Handler, Observer, std::shared_ptr<Handler>>(m, "Handler", py::module_local())
      .def(py::init<py::object>());
  py::class_<Watcher, Observer, std::shared_ptr<Watcher>>(m, "Watcher", py::module_local())
      .def(py::init<std::shared_ptr<Plan>, py::object, py::object, py::object, py::object>())
      .def("begin", &Watcher::begin)
      .def("stop", &Watcher::stop)
      .def("pack", &Watcher::pack)
      .attr("looks_on") = true;  // see `dispatch.hooks_that_look_on`
}
