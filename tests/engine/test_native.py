"""The native watcher matches as the one in Python does, and leaves forwards as they are."""

from __future__ import annotations

import copy
import gc
import operator
import threading
import weakref
from collections.abc import Callable, Generator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from watching import (
    FUNCTIONS,
    ROWS,
    WIDTH,
    Couplings,
    Layer,
    Step,
    add_path,
    assert_same,
    learn,
    step,
    subclasses,
    transforms,
)

from revfx.engine.forward import Forward
from revfx.engine.native import NativeWatching, learner, watcher
from revfx.engine.plan import Plan
from revfx.engine.watch import Watching


WATCHERS = [pytest.param(True, id="python"), pytest.param(False, id="native")]
TORCH: Any = torch._C  # pyright: ignore[reportPrivateUsage]


@pytest.fixture(autouse=True, scope="module")
def built() -> None:
    if watcher() is Watching:
        pytest.skip("there is no compiler for the native watcher")


@pytest.fixture(autouse=True)
def nothing_left() -> Generator[None]:
    """Compare what is switched on for this thread before and after a test."""
    before = TORCH._dispatch_tls_local_include_set(), TORCH._dispatch_tls_local_exclude_set()
    yield
    assert before == (TORCH._dispatch_tls_local_include_set(), TORCH._dispatch_tls_local_exclude_set())


@pytest.fixture
def model() -> nn.Module:
    return Couplings()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(ROWS, 2 * WIDTH)


# --- gradients
@pytest.mark.parametrize("python", WATCHERS)
def test_gradients_have_the_bits_of_plain_autograd(model: nn.Module, x: Tensor, python: bool) -> None:
    plain = copy.deepcopy(model)
    plan = learn(model, x, python)
    for seed in range(4):
        watched = step(model, x, watcher(python)(plan), seed)
        assert watched.count == len(plan.sequence) > 3
        assert_same(watched, step(plain, x, seed=seed))
        for a, b in zip(model.buffers(), plain.buffers(), strict=True):
            assert torch.equal(a, b)
    assert not plan.reasons


@pytest.mark.parametrize("size", [3, 100])
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_units_of_any_operators_match(function: Callable[[Layer, Tensor], Tensor], size: int) -> None:
    model, x = Layer(function), torch.randn(ROWS, WIDTH)
    plain = step(model, x)
    plan = learn(model, x, False, size)
    for _ in range(3):
        watched = step(model, x, NativeWatching(plan))
        assert_same(watched, plain)
        if function not in (subclasses, transforms):  # a mode that runs natively has other objects for their results
            in_python = step(model, x, learner(Watching)(plan))
            assert_same(in_python, plain)
            assert watched.count == in_python.count


def test_as_many_saved_tensors_are_dropped_as_in_python(
    model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete, link, dropped = Forward.complete, Forward.drop_if_exit, list[int]()

    def note_unit(forward: Forward, match: Any) -> None:
        complete(forward, match)
        dropped[-1] += sum(saved.tensor is None for saved, _ in match.saved)

    def note_exit(forward: Forward, saved: Any, t: Tensor) -> None:
        link(forward, saved, t)
        dropped[-1] += saved.tensor is None

    monkeypatch.setattr(Forward, "complete", note_unit)
    monkeypatch.setattr(Forward, "drop_if_exit", note_exit)
    for python in (False, True):
        plan = learn(model, x, python)
        dropped.append(0)
        step(model, x, watcher(python)(plan))
    assert dropped[0] == dropped[1] > 30


class Spy:
    """Note the matches that a forward completes."""

    def __init__(self, watching: Any) -> None:
        self.found: list[dict[str, Any]] = []
        complete = watching.forward.complete

        def note(match: Any) -> None:
            unit = match.of.unit
            self.found.append(
                {
                    "numbers": [*match.numbers],
                    "states": [*match.states],
                    "layouts": dict(match.layouts),
                    "held": {slot: t.clone() for slot, t in match.held.items()},
                    "alive": {slot: t.clone() for slot, t in match.alive.items()},
                    "external": [type(match.given(slot)) for slot in range(match.of.unit.slots)],
                    "tensors": [None if t is None else t.clone() for t in map(match.tensor, range(unit.slots))],
                    "saved": [slot for _, slot in match.saved],
                }
            )
            complete(match)

        watching.forward.complete = note


@pytest.mark.parametrize("function", [*FUNCTIONS[:-1], None], ids=lambda f: getattr(f, "__name__", "couplings"))
def test_matches_are_those_of_python(function: Callable[[Layer, Tensor], Tensor] | None) -> None:
    model = Couplings() if function is None else Layer(function)
    x = torch.randn(ROWS, 2 * WIDTH if function is None else WIDTH)
    plan = learn(model, x, False, 0 if function is None else 5)
    found, state = list[Any](), copy.deepcopy(model.state_dict())
    for _ in range(2):  # the first forward is proven
        found = []
        for kind in (NativeWatching, learner(Watching)):  # both see the same operators
            watching: Any = kind(plan)
            spy = Spy(watching)
            torch.manual_seed(5)
            model.load_state_dict(state)
            with watching:
                model(x)
            found.append(spy.found)
    assert len(found[0]) == len(found[1])
    for a, b in zip(*found, strict=True):
        leaves, others = pytree.tree_leaves(a), pytree.tree_leaves(b)
        assert pytree.tree_structure(a) == pytree.tree_structure(b)
        for v, w in zip(leaves, others, strict=True):
            assert type(v) is type(w)
            assert torch.equal(v, w) if isinstance(v, Tensor) else v == w or v.get_state().equal(w.get_state())


# --- other forwards
@pytest.mark.parametrize("python", WATCHERS)
def test_a_forward_that_turns_out_to_be_another_keeps_everything(model: Any, x: Tensor, python: bool) -> None:
    plan = learn(model, x, python)
    model.blocks[2].activation = torch.tanh
    plain = copy.deepcopy(model)
    watched = step(model, x, watcher(python)(plan))
    assert_same(watched, step(plain, x))
    assert 0 < watched.count < len(plan.sequence)


@pytest.mark.parametrize("python", WATCHERS)
def test_the_expected_unit_goes_on_where_units_of_other_paths_might_begin(python: bool) -> None:
    middle: list[Callable[[Tensor], Tensor]] = [torch.sigmoid]

    def function(m: Layer, x: Tensor) -> Tensor:
        y = (x * m.first.weight).tanh().exp().sin()
        return middle[0](y.cos() * m.second.weight).tanh().exp()

    model, x, plan = Layer(function), torch.randn(WIDTH, WIDTH), Plan()
    add_path(plan, model, x, python, [(0, 3), (4, 8)])  # mul, tanh, exp, sin; cos, mul, sigmoid, tanh, exp
    middle[0] = torch.erf
    add_path(plan, model, x, python, [(0, 4), (5, 6), (7, 8)])  # tanh begins a unit, and is in the first ones
    paths = {torch.sigmoid: plan.others[0], torch.erf: plan.path}
    counts: dict[Any, int] = {}
    for expected in paths:
        plan.path, plan.others = paths[expected], [path for taken, path in paths.items() if taken is not expected]
        for taken in paths:
            middle[0], watching = taken, watcher(python)(plan)
            watched = step(model, x, watching)
            assert_same(watched, step(model, x))
            assert watching.forward.path is paths[taken]
            counts[expected.__name__, taken.__name__] = watched.count
    assert counts == {("sigmoid", "sigmoid"): 2, ("sigmoid", "erf"): 2, ("erf", "erf"): 3, ("erf", "sigmoid"): 1}


def test_numbers_and_constants_that_differ_end_a_match() -> None:
    given: list[Any] = [2.0, None, False]

    def function(m: Layer, x: Tensor) -> Tensor:
        return (m.first(x) * given[0]).clamp(given[1], 1.0).tanh().sum(-1, keepdim=given[2])

    model, x = Layer(function), torch.randn(ROWS, WIDTH)
    plan = learn(model, x, False, 100)
    others = [2.0, -1.0, False], [2.0, None, True], [torch.tensor(2.0), None, False]
    for arguments, count in (([2.0, None, False], 1), ([3.5, None, False], 1), *((other, 0) for other in others)):
        given[:] = arguments
        watched = step(model, x, NativeWatching(plan))
        assert_same(watched, step(model, x))
        assert watched.count == count, arguments


def test_operators_that_torch_hides_from_modes_are_hidden() -> None:
    def function(m: Layer, x: Tensor) -> Tensor:
        return m.first(x) * torch.tensor([2.0])

    model, x = Layer(function), torch.randn(ROWS, WIDTH)
    names: list[list[str]] = []
    for python in (False, True):
        plan = learn(model, x, python, 100)
        names.append([str(op.func) for op in plan.sequence[0].unit.ops])
    assert names[0] == names[1]
    assert names[0] == ["aten.t.default", "aten.addmm.default", "aten.lift_fresh.default", "aten.mul.Tensor"]


# --- errors
def test_an_error_in_the_model_leaves_nothing_behind(model: Any, x: Tensor) -> None:
    plan = learn(model, x, False)
    activation, held = model.blocks[3].activation, list[weakref.ref[Any]]()

    def fail(t: Tensor) -> Tensor:
        held.append(weakref.ref(t))
        raise ValueError("no")

    model.blocks[3].activation = fail
    watching = NativeWatching(plan)
    with pytest.raises(ValueError, match=r"^no$"), watching:
        model(x)
    with pytest.raises(RuntimeError, match="mat1 and mat2"), NativeWatching(plan):
        model(x[:, 1:])
    assert 0 < watching.forward.count < len(plan.sequence)
    gc.collect()
    assert held[0]() is None
    model.blocks[3].activation = activation
    assert step(model, x, NativeWatching(plan)).count == len(plan.sequence)


def test_an_operator_that_fails_ends_the_match() -> None:
    def function(m: Layer, x: Tensor) -> Tensor:
        y = m.first(x)
        with pytest.raises(RuntimeError, match="size of tensor"):
            operator.add(y, torch.ones(WIDTH + 1))
        return (y + torch.ones(WIDTH)).tanh()

    model, x = Layer(function), torch.randn(ROWS, WIDTH)
    plain = step(model, x)
    plan = learn(Layer(lambda m, x: (m.first(x) + torch.ones(WIDTH)).tanh()), x, False, 100)
    watched = step(model, x, NativeWatching(plan))
    assert_same(watched, plain)
    assert watched.count == 0


def test_errors_of_callbacks_reach_the_call(model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = learn(model, x, False)

    def fail(*_: Any) -> None:
        raise KeyError("complete")

    monkeypatch.setattr(Forward, "complete", fail)
    with pytest.raises(KeyError, match="complete"), NativeWatching(plan):
        model(x)
    monkeypatch.undo()
    assert step(model, x, NativeWatching(plan)).count == len(plan.sequence)


def test_nothing_stays_in_memory(model: nn.Module, x: Tensor) -> None:
    plan = learn(model, x, False)
    step(model, x, NativeWatching(plan))
    gc.collect()
    gc.disable()
    try:
        watching = NativeWatching(plan)
        forward = weakref.ref(watching.forward)
        step(model, x, watching)
        del watching
        assert forward() is None
    finally:
        gc.enable()


# --- threads, and watchers inside of others
def test_threads_watch_by_themselves(model: nn.Module, x: Tensor) -> None:
    plan = learn(model, x, False)
    plain, results = step(copy.deepcopy(model).eval(), x), dict[int, list[Step]]()
    barrier = threading.Barrier(3)

    def work(number: int) -> None:
        own = copy.deepcopy(model).eval()
        own_plan = learn(own, x, False)
        barrier.wait()
        for _ in range(5):
            watching = None if number == 0 else NativeWatching(own_plan)
            results.setdefault(number, []).append(step(own, x, watching))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    with NativeWatching(plan) as outer:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert outer.forward.count == 0
    for number in range(3):
        for result in results[number]:
            assert_same(result, plain)
            assert (result.count > 0) == (number > 0)


def test_an_outer_watcher_sees_the_operators_of_an_inner_one(model: nn.Module, x: Tensor) -> None:
    plan = learn(model, x, False)
    plain = step(copy.deepcopy(model), x)
    inner = NativeWatching(plan)
    step(model, x, NativeWatching(plan))  # proves the replays

    class Both:
        def __init__(self) -> None:
            self.outer = NativeWatching(plan)
            self.forward = inner.forward

        def __enter__(self) -> None:
            self.outer.__enter__()
            inner.__enter__()

        def __exit__(self, *error: Any) -> None:
            inner.__exit__(*error)
            self.outer.__exit__(*error)

    both = Both()
    watched = step(model, x, both)
    assert torch.equal(watched.out, plain.out)
    assert watched.count == both.outer.forward.count == len(plan.sequence)
