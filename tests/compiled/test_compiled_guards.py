"""What compiled graphs check in every run: a check that fails is a Python exception, raised in the backward."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from compiled import QUIET, fresh as fresh
from helpers import deep_but
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch._functorch import config as functorch_config

from revfx.compiled.partitioner import ReversiblePartitioner
from revfx.errors import BudgetWarning, RegenerationError


pytestmark = QUIET
WIDTH, ROWS, DEPTH = 8, 1024, 3  # of a stream, and enough for loops of several threads


class Guarded(nn.Module):
    """Couplings that rely on something which `spoil` changes."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = (nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)) for _ in "fg")

    def couple(self, a: Tensor, b: Tensor, i: int) -> tuple[Tensor, Tensor]:
        a = a + self.f[i](b).tanh()
        return a, b + self.g[i](a).tanh()

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for i in range(DEPTH):
            a, b = self.couple(a, b, i)
        return torch.cat([a, b], -1)

    def spoil(self, x: Tensor) -> Tensor:
        """The inputs of a step in which it does not hold; called between a step in which it does, and that one."""
        return x

    def spoil_backward(self) -> None:
        """The same between forward and backward."""


class Permuted(Guarded):
    """An index that stops being a permutation."""

    order: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("order", torch.arange(WIDTH - 1, -1, -1))

    def couple(self, a: Tensor, b: Tensor, i: int) -> tuple[Tensor, Tensor]:
        a, b = super().couple(a, b, i)
        return a[:, self.order], b

    def spoil(self, x: Tensor) -> Tensor:
        self.order.fill_(0)
        return x


class Chosen(Guarded):
    """Indices of halves, one of which becomes another."""

    even: Tensor
    odd: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("even", torch.arange(0, 2 * WIDTH, 2))
        self.register_buffer("odd", torch.arange(1, 2 * WIDTH, 2))

    def forward(self, x: Tensor) -> Tensor:
        for i in range(DEPTH):
            a, b = x[:, self.even], x[:, self.odd]
            a, b = self.couple(a, b, i)
            x = torch.empty_like(x)
            x[:, self.even], x[:, self.odd] = b, a
        return x

    def spoil(self, x: Tensor) -> Tensor:
        self.even[0] = 1
        return x


class Masked(Guarded):
    """A mask of zeros and ones that gets another number."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", (torch.arange(2 * WIDTH) % 2).to(torch.get_default_dtype()))
        self.nets = nn.ModuleList(nn.Linear(2 * WIDTH, 2 * WIDTH) for _ in range(2 * DEPTH))

    def forward(self, x: Tensor) -> Tensor:
        for i, net in enumerate(self.nets):
            mask = self.mask if i % 2 else 1 - self.mask
            x = mask * x + (1 - mask) * (x + net(mask * x).tanh())
        return x

    def spoil(self, x: Tensor) -> Tensor:
        self.mask[3] = 0.5
        return x


class Drift(Guarded):
    """Functions that are others in the backward than in the forward, written past autograd's look at versions."""

    def spoil_backward(self) -> None:
        for p in self.parameters():
            p.data.mul_(2.0)


GUARDS: dict[type[Guarded], str] = {
    Permuted: "an index is no permutation",
    Chosen: "an index holds other numbers",
    Masked: "a mask does not hold zeros and ones only",
    Drift: "differs from the forward's by more than 1 %",
}


def spoilt(kind: type[Guarded], dynamic: bool = False, **options: Any) -> tuple[Guarded, Tensor, Tensor]:
    """A compiled model, the input and the output of a step that is to raise."""
    torch.manual_seed(0)
    model = kind()
    call: Any = torch.compile(model, backend="revfx", options=options, dynamic=dynamic)
    x = torch.randn(ROWS, 2 * WIDTH)
    call(x.clone().requires_grad_()).sum().backward()
    model.zero_grad()
    x = model.spoil(x).clone().requires_grad_()
    out = call(x)
    model.spoil_backward()
    return model, x, out


def main(name: str, dtype: str) -> None:
    """Print what a spoilt step raises, under inductor, with loops of two threads."""
    torch.set_num_threads(2)
    torch.set_default_dtype(getattr(torch, dtype))
    kind = next(kind for kind in GUARDS if kind.__name__ == name)
    options: dict[str, Any] = {"cpp.simdlen": 1}
    _, _, out = spoilt(kind, **options)
    try:
        out.sum().backward()
    except RegenerationError as error:
        print(error)


CASES = [(kind, dtype) for kind in GUARDS for dtype in ("float32", "float64")]


@pytest.mark.parametrize(("kind", "dtype"), deep_but([(Drift, "float32")], CASES))
def test_a_check_that_fails_under_inductor_is_a_python_exception(kind: type[Guarded], dtype: str) -> None:
    """An assertion in a kernel of several threads ended the process."""
    here = Path(__file__).parent
    folders = [str(here), str(here.parent / "support")]
    program = f"import sys; sys.path[:0] = {folders!r}; import {Path(__file__).stem} as t; "
    call = f"t.main({kind.__name__!r}, {dtype!r})"
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", program + call], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert re.search(GUARDS[kind], run.stdout), run.stdout + run.stderr


ROUNDING: Mapping[str, Any] = MappingProxyType({"inner": "aot_eager", "exact": False})
LOSSLESS = {**GUARDS, Drift: "does not match the forward's"}


@pytest.mark.parametrize(("kind", "dynamic"), [*((kind, False) for kind in GUARDS), (Drift, True)])
def test_no_gradient_is_handed_out(kind: type[Guarded], dynamic: bool) -> None:
    _assert_raises(GUARDS[kind], *spoilt(kind, dynamic, **ROUNDING))


@pytest.mark.parametrize(("kind", "dynamic"), [(Permuted, False), (Chosen, False), (Drift, False), (Drift, True)])
def test_no_gradient_is_handed_out_with_codes(kind: type[Guarded], dynamic: bool) -> None:
    _assert_raises(LOSSLESS[kind], *spoilt(kind, dynamic, inner="aot_eager"))


def _assert_raises(message: str, model: Guarded, x: Tensor, out: Tensor) -> None:
    with pytest.raises(RegenerationError, match=message):
        out.sum().backward()
    assert all(t.grad is None for t in (x, *model.parameters()))


@pytest.mark.parametrize("kind", deep_but([Permuted], [Permuted, Drift]))
def test_compiled_autograd_drops_no_check(kind: type[Guarded]) -> None:
    """It traces the backward once more, and there an operator that only writes what nothing reads would be gone."""
    _, _, out = spoilt(kind, **ROUNDING)
    traced = torch.compile(backend="aot_eager")
    with pytest.raises(RegenerationError, match=GUARDS[kind]):
        with compiled_autograd._enable(traced):  # pyright: ignore[reportPrivateUsage]
            out.sum().backward()


def test_nothing_is_checked_in_the_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would make the host wait for the device; and CUDA graphs hold no check."""
    halves: list[Any] = []
    plain: Callable[..., Any] = ReversiblePartitioner.partition

    def partition(*args: Any, **kwargs: Any) -> Any:
        halves.extend(plain(*args, **kwargs))
        return halves

    monkeypatch.setattr(ReversiblePartitioner, "partition", partition)
    spoilt(Permuted, **ROUNDING)
    check = torch.ops.revfx.check.default
    forward, backward = ([n for n in half.graph.nodes if n.target is check] for half in halves)
    assert (len(forward), len(backward)) == (0, 1)
    assert torch.Tag.cudagraph_unsafe in check.tags
    assert not [n for half in halves for n in half.graph.nodes if "_assert_async" in str(n.target)]


# --- torch's budget, where it draws random numbers a second time
class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = nn.functional.dropout(layer(x).relu(), 0.5)
        return x


@pytest.mark.parametrize("budget", [0.0, 0.5])
def test_a_graph_with_dropout_does_not_follow_a_budget(budget: float) -> None:
    """Its gradients were those of other random numbers (pytorch/pytorch#190717)."""
    model, x = Dropping(), torch.randn(ROWS, WIDTH, requires_grad=True)
    compiled: Any = torch.compile(model, backend="revfx", options={"inner": "aot_eager"})
    found: list[Any] = []
    warned = pytest.warns(BudgetWarning, match=rf"`activation_memory_budget` of {budget}")
    with functorch_config.patch(activation_memory_budget=budget), warned:
        for call in compiled, model:
            torch.manual_seed(1)
            found.append(torch.autograd.grad(call(x).sin().sum(), [x, *model.parameters()]))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
