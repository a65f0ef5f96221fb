"""A training step runs each forward once: whatever it counts, draws and reads goes on as without revfx."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from ways import BUILD

import revfx


STEPS, DEPTH, WIDTH, ROWS = 20, 4, 8, 512
counts = {"global": 0}


class Slots:
    __slots__ = ("calls",)

    def __init__(self) -> None:
        self.calls = 0


class Drawn:
    """A source of numbers with a state of its own, of which a bound method is called."""

    def __init__(self, seed: int) -> None:
        self.generator = np.random.default_rng(seed)

    def draw(self) -> float:
        return float(self.generator.random())


class Counted(nn.Module):
    """A layer that counts its calls in every place where programs do, and reads every kind of random state."""

    calls_of_class: ClassVar[int] = 0

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.calls, self.slots, self.steps = 0, Slots(), itertools.count()
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.generator = torch.Generator().manual_seed(seed)
        self.draw = Drawn(seed).draw
        self.python = random.Random(seed)
        self.closure = self._closure()

    def _closure(self) -> Callable[[], int]:
        calls = 0

        def count() -> int:
            nonlocal calls
            calls += 1
            return calls

        return count

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.slots.calls += 1
        counts["global"] += 1
        type(self).calls_of_class += 1
        self.get_buffer("seen").add_(1)
        factor = 1 + next(self.steps) / 100 + self.closure() / 100
        factor += self.draw() + self.python.random() + random.random() + float(np.random.rand())
        noise = torch.rand(WIDTH, generator=self.generator)
        return F.dropout(torch.tanh(self.linear(x) * factor + noise), 0.2)


def trained(way: str) -> dict[str, Any]:
    """Return all that `STEPS` steps count and leave, and their losses."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    counts["global"] = Counted.calls_of_class = 0
    layers = [Counted(k) for k in range(2 * DEPTH)]
    model = BUILD[way](layers[:DEPTH], layers[DEPTH:])
    hooks: dict[str, int] = {"before": 0, "after": 0, "backward": 0}

    def counting(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            hooks[name] += 1

        return hook

    for layer in layers:
        layer.register_forward_pre_hook(counting("before"))
        layer.register_forward_hook(counting("after"))
        layer.register_full_backward_hook(counting("backward"))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    losses: list[Tensor] = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model(torch.randn(ROWS, 2 * WIDTH, requires_grad=True)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    states = [torch.get_rng_state(), *(layer.generator.get_state() for layer in layers)]
    return {
        "losses": [float(x) for x in losses],
        "counts": [(k.calls, k.slots.calls, next(k.steps), int(k.get_buffer("seen")), k.closure()) for k in layers],
        "global": (counts["global"], Counted.calls_of_class),
        "hooks": hooks,
        "random": [s.tolist() for s in states],
        "others": [np.random.rand(), random.random()],
        "own": [(k.draw(), k.python.random()) for k in layers],
    }


@pytest.mark.parametrize("way", ["convert", "rev_block", "RevBlock"])
def test_a_step_counts_draws_and_reads_what_the_plain_one_does(way: str) -> None:
    got, want = trained(way), trained("plain")
    for name, value in want.items():
        assert got[name] == value, name
    assert want["counts"][0][0] == STEPS and want["hooks"]["backward"] == 2 * DEPTH * STEPS


# --- the root module
class Root(nn.Module):
    """A model that hands out its next noise level, stores it, and reads what others change between steps."""

    scale: ClassVar[float] = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.fs = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))
        self.levels: Iterator[float] = itertools.cycle([0.5, 1.0, 2.0])
        self.level, self.calls, self.index = 0.0, 0, {"at": 0}

    def forward(self, x: Tensor) -> Tensor:
        self.level = next(self.levels)
        self.calls += 1
        self.index["at"] = self.calls % 3
        a, b = x.chunk(2, -1)
        for f in self.fs:
            a, b = b + (f(a) * self.level * type(self).scale * counts["factor"] + self.index["at"]).tanh(), a
        return torch.cat([a, b], -1)


def test_what_the_root_stores_and_what_changes_between_steps_is_read_anew() -> None:
    torch.manual_seed(0)
    plain = Root()
    model = Root()
    model.load_state_dict(plain.state_dict())
    revfx.convert(model)
    for step in range(STEPS):
        counts["factor"], Root.scale = 1 + step, 1 / (1 + step % 4)
        x = torch.randn(ROWS, 2 * WIDTH)
        outs = [m(x) for m in (model, plain)]
        for m, y in zip((model, plain), outs, strict=True):
            m.zero_grad()
            y.square().mean().backward()
        assert torch.equal(*outs)
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            assert p.grad is not None and q.grad is not None and torch.equal(p.grad, q.grad)
        assert (model.level, model.calls, model.index) == (plain.level, plain.calls, plain.index)
