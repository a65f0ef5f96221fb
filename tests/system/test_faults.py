"""Whatever raises, wherever in a step: it reaches the user as it is, nothing stays changed, and the next step works."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from faults import KINDS, Busy, Called, Dispatched, Left, Own, around, busy
from helpers import DEEP, TOLERANCE, deep_but, fp64 as fp64, leaf, loss_of, mlps, relative_error, unseen
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from ways import BUILD, Plain

import revfx
from revfx.converted import Reversible


WAYS = ("convert", "rev_block", "RevBlock")
ways = pytest.mark.parametrize("way", WAYS)
DEPTH, SEED = 2, 3
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


class Attack:
    """One model, of which steps are broken off; and what the plain model gives and leaves."""

    def __init__(self, way: str) -> None:
        self.model, self.x = built(way), leaf(6, 8)
        self.first = [b.clone() for b in self.model.buffers()]
        plain = built("plain")
        self.expected, self.end = gradients(plain, self.x), Left.by(plain)
        self.on_the_way = set(self._left_by(plain))

    def _left_by(self, plain: nn.Module) -> Iterator[Left]:
        """What a forward of the plain model leaves that is broken off at its first operation, at its second, ..."""
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
        """Whether the n-th operation was reached, where `error` is raised; all that must hold then is asserted."""
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
        assert relative_error(gradients(self.model, self.x), self.expected) < TOLERANCE
        assert Left.by(self.model) == self.end


@pytest.mark.parametrize("way", ("convert", "rev_block"))
@pytest.mark.parametrize(("mode", "every"), [(Dispatched, 43), (Called, 97)])
def test_what_raises_at_any_operation_of_a_step_comes_through_and_leaves_nothing(
    way: str, mode: Mode, every: int
) -> None:
    every = 1 if DEEP else every  # all of them take four minutes
    attack = Attack(way)
    attack.check_the_next_step()
    n = 1
    while attack.strike(mode, n, KINDS[n % len(KINDS)](n)):
        if n % 3 == 0:
            attack.check_the_next_step()
        n += every
    assert n > 400
    attack.check_the_next_step()


@pytest.mark.parametrize("kind", deep_but((KeyboardInterrupt,), (KeyboardInterrupt, MemoryError, Own)))
def test_what_raises_while_the_forward_is_recorded_comes_through_and_leaves_nothing(kind: type[BaseException]) -> None:
    """A fault of another kind, such as a KeyError, is the forward's own, and raised again when that runs."""
    model, x = built("convert"), leaf(6, 8)
    expected = gradients(built("plain"), x)
    for n in (1, 2, 5, 9, 30, 60):
        before, start, error = around(model), Left.by(model), kind(n)
        with pytest.raises(kind) as caught, Called(n, error):
            model(x)
        assert caught.value is error
        assert around(model) == before and Left.by(model) == start
    assert relative_error(gradients(model, x), expected) < TOLERANCE
    assert isinstance(model, Reversible) and len(model.revfx.plans) == 1


# --- in f itself
class Fails(nn.Module):
    """Raises what is in its list, instead of its last operation."""

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
@pytest.mark.parametrize("layer", [0, 2])
def test_what_f_raises_when_it_runs_again_is_raised_by_the_backward_which_may_be_called_again(
    way: str, kind: type[BaseException], layer: int
) -> None:
    fs, gs = [Fails() for _ in range(3)], [Fails() for _ in range(3)]
    model, x = BUILD[way](fs, gs), leaf(6, 8)
    y = model(x)
    before = around(model)
    fs[layer].raises.values.append(kind("mine"))
    with pytest.raises(kind) as caught:
        loss_of(y).backward(retain_graph=True)
    assert caught.value is fs[layer].raises.values.pop()
    assert around(model) == before
    model.zero_grad()
    x.grad = None
    loss_of(y).backward()  # the same graph
    got = [x.grad, *(p.grad for p in nn.ModuleList([*fs, *gs]).parameters())]
    model.zero_grad()
    x.grad = None
    loss_of(Plain(fs, gs)(x)).backward()
    assert relative_error(got, [x.grad, *(p.grad for p in nn.ModuleList([*fs, *gs]).parameters())]) < TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:.*only its sub-modules:revfx.errors.RevfxWarning")
def test_forward_that_raises_at_the_first_call_is_recorded_again_at_the_next(kind: type[BaseException]) -> None:
    fs, gs = [Fails() for _ in range(3)], [Fails() for _ in range(3)]
    model: Any = revfx.convert(Plain(fs, gs))
    fs[1].raises.values.append(kind("mine"))
    with pytest.raises(kind) as caught:
        model(leaf(6, 8))
    assert caught.value is fs[1].raises.values.pop()
    loss_of(model(leaf(6, 8))).backward()
    assert len(model.revfx.plans) == 1 and model.revfx.plans[0].regions and model.revfx.refusals == ()


def test_modes_that_count_operations_see_nothing_of_planning() -> None:
    model, x = BUILD["convert"](mlps(4), mlps(4)), leaf(6, 8)
    counts: list[int] = []
    for _ in range(2):
        with FlopCounterMode(display=False) as counter:
            loss_of(model(x)).backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("way", ("convert", "rev_block"))
def test_interrupt_while_what_a_re_run_changed_is_put_back_changes_nothing(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, set_state = built(way), leaf(6, 8), torch.set_rng_state
    calls = [0, 0]  # so far, and which one is interrupted, after its work or instead of it

    def interrupted(state: Tensor) -> None:
        calls[0] += 1
        if calls[0] == calls[1]:
            if calls[1] % 4 < 2:
                set_state(state)
            raise KeyboardInterrupt
        set_state(state)

    n = 0
    while True:
        n += 1
        loss = loss_of(model(x))
        left, before = Left.by(model), around(model)
        with monkeypatch.context() as patch:
            calls[:] = 0, n
            patch.setattr(torch, "set_rng_state", interrupted)
            try:
                loss.backward()
            except KeyboardInterrupt:
                pass
            else:
                break
        assert around(model) == before and Left.by(model) == left, n
    assert n > 4 * DEPTH  # every re-run sets the state, and sets it back
