"""Whatever raises, wherever in a step: it reaches the user as it is, nothing stays changed, and the next step works."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from faults import KINDS, Busy, Called, Dispatched, Left, Own, around, busy
from helpers import TOLERANCE, fp64 as fp64, leaf, loss_of, mlps, relative_error
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from ways import BUILD, Plain

import revfx
from revfx.convert import Reversible


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

    def _left_by(self, plain: nn.Module) -> Any:
        """What a forward of the plain model leaves that is broken off at its first operation, at its second, ..."""
        while True:
            self.start_again(plain)
            error, n = Own(), sum(1 for _ in ())
            for n in range(1, 10**6):
                self.start_again(plain)
                try:
                    with Dispatched(n, error):
                        plain(self.x)
                except Own:
                    yield Left.by(plain)
                else:
                    yield Left.by(plain)
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


@ways
@pytest.mark.parametrize("mode", [Dispatched, Called])
def test_what_raises_at_any_operation_of_a_step_comes_through_and_leaves_nothing(way: str, mode: Mode) -> None:
    attack = Attack(way)
    attack.check_the_next_step()
    n = 1
    while attack.strike(mode, n, KINDS[n % len(KINDS)](n)):
        if n % 4 == 0:
            attack.check_the_next_step()
        n += 1
    assert n > 400
    attack.check_the_next_step()
