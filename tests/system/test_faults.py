"""Whatever raises, wherever in a step: it reaches the user as it is, nothing stays changed, and the next step works."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from faults import KINDS, Busy, Called, Dispatched, Left, Own, around, busy
from helpers import DEEP, fp64 as fp64, kept_cuts, leaf, loss_of, mlps, unseen
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from ways import BUILD

from revfx.converted import Reversible
from revfx.engine import randomness
from revfx.engine.call import UnitCall
from revfx.engine.native import CHOICE


WAYS = ("convert", "rev_block", "RevBlock")
ways = pytest.mark.parametrize("way", WAYS)
DEPTH, SEED = 2, 3
STEADY = 2  # steps, after which a model neither learns nor proves
Mode = type[Dispatched] | type[Called]


# --- at every operation
def built(way: str) -> nn.Module:
    torch.manual_seed(0)
    return BUILD[way]([Busy() for _ in range(DEPTH)], [Busy() for _ in range(DEPTH)])


def gradients(model: nn.Module, x: Tensor) -> list[Tensor | None]:
    """Those of one step, from a fixed random state."""
    torch.manual_seed(SEED)
    x.grad = None
    model.zero_grad()
    loss_of(model(x)).backward()
    return [x.grad, *(p.grad for p in model.parameters())]


def assert_same(got: list[Tensor | None], want: list[Tensor | None]) -> None:
    assert all(g is w if g is None or w is None else torch.equal(g, w) for g, w in zip(got, want, strict=True))


class Attack:
    """Models of which a step is broken off; and the gradients and the state of the plain model.

    `steps`: how many steps a model has taken before: it learns, proves, or is steady.
    """

    def __init__(self, way: str, steps: int) -> None:
        self.way, self.steps, self.x = way, steps, leaf(6, 8)
        plain = built("plain")
        self.first = [b.clone() for b in plain.buffers()]
        self.expected, self.end = gradients(plain, self.x), Left.by(plain)
        self.on_the_way = set(self._left_by(plain))
        self.model = self._model()

    def _model(self) -> nn.Module:
        model = built(self.way)
        for _ in range(self.steps):
            gradients(model, self.x)
        return model

    def _left_by(self, plain: nn.Module) -> Iterator[Left]:
        """Yield the state after a forward of plain that is broken off at the first operation, the second, ..."""
        for n in itertools.count(1):
            self.start_again(plain)
            active = Dispatched(n, Own())
            with contextlib.suppress(Own), active:
                plain(self.x)
            yield Left.by(plain)
            if active.count < n:
                return

    def start_again(self, model: nn.Module) -> None:
        torch.manual_seed(SEED)
        for b, value in zip(model.buffers(), self.first, strict=True):
            b.copy_(value)
        for m in busy(model):
            m.calls = 0

    def strike(self, mode: Mode, n: int, error: BaseException) -> bool:
        """Raise `error` in place of the n-th operation; return whether there was one."""
        if self.steps < STEADY:
            self.model = self._model()
        self.start_again(self.model)
        self.model.zero_grad()
        before, phase, caught = around(self.model), "forward", None
        active = mode(n, error)
        try:
            with active:
                loss = loss_of(self.model(self.x))
                phase = "backward"
                loss.backward()
        except BaseException as e:
            caught = e
        if caught is None:
            assert active.count < n
            return False
        assert caught is error, (n, phase)
        after = around(self.model)
        assert after == before, (n, phase, [k for k in before if before[k] != after[k]])
        left = Left.by(self.model)
        assert left == self.end if phase == "backward" else left in self.on_the_way, (n, phase)
        return True

    def check_the_next_step(self) -> None:
        self.start_again(self.model)
        assert_same(gradients(self.model, self.x), self.expected)
        assert Left.by(self.model) == self.end


@pytest.mark.parametrize("steps", [0, 1, STEADY])
@pytest.mark.parametrize("way", ("convert", "rev_block"))
@pytest.mark.parametrize(("mode", "every"), [(Dispatched, 193), (Called, 97)])
def test_an_error_at_any_operation_of_a_step_comes_through_and_leaves_nothing(
    way: str, mode: Mode, every: int, steps: int
) -> None:
    every = 1 if DEEP else every  # all of them take minutes
    attack, plain = Attack(way, steps), Attack("plain", steps)
    attack.check_the_next_step()
    n = 1
    while attack.strike(mode, n, KINDS[n % len(KINDS)](n)):
        assert plain.strike(mode, n, Own()) or mode is Called, "a user's mode sees the operators of plain alone"
        if n % 3 == 0 or steps < STEADY:
            attack.check_the_next_step()
            attack.check_the_next_step()
        n += every
    assert not plain.strike(mode, n, Own()) and n > 2 * every
    attack.check_the_next_step()


# --- in f itself, and in replays
class Fails(nn.Module):
    """Raises the error in its list, instead of its last operation."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.raises = nn.Linear(4, 4), nn.BatchNorm1d(4), unseen()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.norm(self.inner(x)))
        if self.raises.values:
            raise self.raises.values[0]
        return h * 2


@ways
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_late", [False, True])
def test_an_error_in_a_replay_is_raised_by_the_backward_which_may_be_called_again(
    way: str, kind: type[BaseException], is_late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs, gs = [Fails() for _ in range(3)], [Fails() for _ in range(3)]
    model, x, run = BUILD[way](fs, gs), leaf(6, 8), UnitCall.replay
    expected = gradients(BUILD["plain"](fs, gs), x)
    for _ in range(2):
        assert_same(gradients(model, x), expected)
    replays = [0]

    def interrupted(call: UnitCall, *slot: int) -> None:
        replays[0] += 1
        if replays[0] == at:
            if is_late:
                run(call, *slot)
            raise error
        run(call, *slot)

    at = 0
    while True:
        at += 1
        torch.manual_seed(SEED)
        model.zero_grad()
        x.grad, replays[0], error = None, 0, kind("mine")
        y = model(x)
        before, random = around(model), torch.get_rng_state()
        with monkeypatch.context() as patch:
            patch.setattr(UnitCall, "replay", interrupted)
            try:
                loss_of(y).backward(retain_graph=True)
            except kind as e:
                assert e is error
            else:
                break
        assert around(model) == before and torch.equal(torch.get_rng_state(), random)
        model.zero_grad()
        x.grad = None
        loss_of(y).backward()  # the same graph
        assert_same([x.grad, *(p.grad for p in model.parameters())], expected)
    assert replays[0] > 3
    assert_same(gradients(model, x), expected)


@ways
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [0, 1, STEADY])
def test_an_error_in_f_is_raised_by_the_forward_and_the_next_steps_are_right(
    way: str, kind: type[BaseException], steps: int
) -> None:
    fs, gs = [Fails() for _ in range(3)], [Fails() for _ in range(3)]
    model, x = BUILD[way](fs, gs), leaf(6, 8)
    expected = gradients(BUILD["plain"](fs, gs), x)
    for _ in range(steps):
        assert_same(gradients(model, x), expected)
    before = around(model)
    fs[1].raises.values.append(kind("mine"))
    with pytest.raises(kind) as caught:
        model(x)
    assert caught.value is fs[1].raises.values.pop() and around(model) == before
    for _ in range(4):
        assert_same(gradients(model, x), expected)
    if isinstance(model, Reversible):
        assert len(model.revfx.plans) == 1 and kept_cuts(model) == 2 and model.revfx.refusals == ()


@pytest.mark.parametrize("way", ("convert", "rev_block"))
def test_modes_that_count_operations_see_those_of_the_model_alone(way: str) -> None:
    fs, gs, x = mlps(4), mlps(4), leaf(6, 8)
    counts: dict[str, list[int]] = {"plain": [], way: []}
    for name, found in counts.items():
        model = BUILD[name](fs, gs)
        for _ in range(4):
            with FlopCounterMode(display=False) as counter:
                loss_of(model(x)).backward()
            found.append(counter.get_total_flops())
    assert counts[way] == counts["plain"] and counts[way][0] > 0


class Interrupts:
    """A generator of which a call of `set_state` is interrupted, after its work or instead of it."""

    def __init__(self, own: torch.Generator) -> None:
        self.own, self.calls, self.at = own, 0, 0

    def get_state(self) -> Tensor:
        return self.own.get_state()

    def set_state(self, state: Tensor) -> None:
        self.calls += 1
        if self.calls == self.at:
            if self.at % 4 < 2:
                self.own.set_state(state)
            raise KeyboardInterrupt
        self.own.set_state(state)


@pytest.mark.parametrize("way", ("convert", "rev_block"))
def test_interrupt_while_a_replay_sets_the_random_state_changes_nothing(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CHOICE, "python")
    generator: Any = Interrupts(torch.default_generator)
    monkeypatch.setattr(randomness, "_default_generator", lambda device: generator)
    model, x = built(way), leaf(6, 8)
    for _ in range(2):
        gradients(model, x)
    n = 0
    while True:
        n += 1
        loss = loss_of(model(x))
        left, before = Left.by(model), around(model)
        generator.calls, generator.at = 0, n
        try:
            loss.backward()
        except KeyboardInterrupt:
            assert around(model) == before and Left.by(model) == left, n
        else:
            break
    assert n > 4 * DEPTH, "each replay of dropout sets the state, and sets it back"
