"""Programs whose steps vary, or that reach beyond the dispatcher: six steps of SGD within a budget."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from fit_models import Residual, branch, equal, quick_search as quick_search
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as module_hooks

import revfx
from revfx.engine.dispatch import hooks_around
from revfx.testing import measure_memory


STEPS, SHARE = 6, 0.65
LATER = {"raw memory"}  # programs whose first step holds blocks whole, as what NumPy filled is gone when they end
Program = tuple[nn.Module, Callable[[nn.Module, int], Tensor]]  # a model, and the loss of a step


def layers(n: int = 6, d: int = 64) -> list[nn.Module]:
    return [branch(d) for _ in range(n)]


def data(step: int, n: int = 256, d: int = 64) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(step))


def plain_loss(model: nn.Module, step: int) -> Tensor:
    return model(data(step)).square().mean()


class OwnGenerator(Residual):
    """Noise from a generator of the model's own, and from NumPy's and Python's."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.seed = 0

    def forward(self, x: Tensor) -> Tensor:
        self.seed += 1
        generator = torch.Generator().manual_seed(self.seed)
        numpy, python = np.random.default_rng(self.seed), random.Random(self.seed)
        for layer in self.layers:
            noise = torch.randn(x.shape, generator=generator) * float(numpy.normal()) * python.random()
            x = x + (layer(x) + 0.1 * noise).tanh()
        return x


class Iterating(Residual):
    """An iterator, a counter in a class, and one in a closure."""

    count = 0

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.steps = iter(range(100))
        self.last = -1

    def __deepcopy__(self, memo: Any) -> Iterating:
        return type(self)(*copy.deepcopy([*self.layers], memo))

    def forward(self, x: Tensor) -> Tensor:
        self.last = next(self.steps)
        self.count += 1
        for layer in self.layers:
            x = x + (layer(x) * (1 + self.last / 10) / self.count).tanh()
        return x


class Indexing(Residual):
    """An index in a dictionary that changes at the sixth call, and numbers of NumPy."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.config: dict[str, Any] = {"column": 0, "scale": np.float64(0.5), "calls": np.int64(0)}

    def forward(self, x: Tensor) -> Tensor:
        self.config["calls"] += 1
        self.config["column"] = int(self.config["calls"] >= STEPS)
        for layer in self.layers:
            gate = x[:, self.config["column"], None].sigmoid()
            x = x + (layer(x) * gate * float(self.config["scale"])).tanh()
        return x


class Caching(nn.Module):
    """A block that computes its positions when it is first called, as ConViT's do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.positions: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.positions is None:
            self.positions = torch.arange(x.shape[1]).flip(0) + 0
        return self.inner(x.index_select(1, self.positions).tanh())


class Dropping(Residual):
    """Stochastic depth, drawn by torch and by Python."""

    def forward(self, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            if number % 2 and torch.rand(()).item() < 0.4:
                continue
            x = x + layer(x)
        return x


class Casting(Residual):
    """Autocast inside of the forward."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x).float()


class Decorated(Residual):
    @torch.autocast("cpu", torch.bfloat16)  # pyright: ignore[reportUntypedFunctionDecorator]
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Raw(Residual):
    """Memory that NumPy fills, which no dispatcher sees."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            h = layer(x)
            scale = torch.empty(h.shape)
            np.abs(h.detach().numpy(), out=scale.numpy())
            x = x + (h / (1 + scale)).tanh()
        return x


class Complex(Residual):
    """Products with conjugates, which are views with a bit."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            h = torch.view_as_complex(layer(x).view(-1, 32, 2))
            g = h @ h.mH / h.shape[0]
            x = x + torch.view_as_real((g @ h) * h.conj()).reshape(x.shape).tanh()
        return x


class Sparse(Residual):
    """A sparse neighbourhood."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.register_buffer("neighbours", torch.eye(256).roll(1, 0).to_sparse())

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(torch.sparse.mm(self.neighbours, x)).tanh()
        return x


class Conditional(Residual):
    """`torch.cond`, and derivatives by `torch.func` inside."""

    def forward(self, x: Tensor) -> Tensor:
        slope = torch.func.grad(lambda t: t.sin().sum())(x.detach())
        for layer in self.layers:
            h = layer(x)
            x = x + torch.cond(h.sum() > 0, lambda t: t.sin(), lambda t: t.cos(), (h,)) * slope
        return x


class Forces(Residual):
    """A derivative with a graph of its own, inside of the forward."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        energy = super().forward(x).tanh().sum()
        (forces,) = torch.autograd.grad(energy, x, create_graph=True)
        return forces + x


class Masked(Residual):
    """A length that is a number of the data."""

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        n = int(lengths.sum())
        for layer in self.layers:
            x = torch.cat((x[:n] + layer(x[:n]), x[n:]))
        return x


class Experts(nn.Module):
    """Each token goes to one of some experts."""

    def __init__(self, d: int = 64) -> None:
        super().__init__()
        self.router = nn.Linear(d, 4)
        self.experts = nn.ModuleList(branch(d) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x).softmax(-1)
        best, chosen = weights.max(-1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero().squeeze(1)
            if len(rows):
                out = out.index_add(0, rows, expert(x[rows]) * best[rows, None])
        return out


class Selecting(Residual):
    """A mask picks rows, and labels of a loss that reads as many as it is told."""

    def forward(self, x: Tensor, mask: Tensor, labels: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        for layer in self.layers:
            x = x.masked_scatter(mask[:, None], (x + layer(x))[mask].sin().exp().tanh())
        scores = x.view(-1, 4, x.shape[-1]).log_softmax(-1)
        spoken = labels > 0
        return F.ctc_loss(scores, labels.masked_select(spoken), torch.full((4,), len(scores)), spoken.sum(-1))


def _selecting_loss(model: nn.Module, step: int) -> Tensor:
    draw = torch.Generator().manual_seed(step)
    return model(data(step), torch.rand(256, generator=draw) < 0.9, torch.randint(0, 64, (4, 10), generator=draw))


def _masked_loss(model: nn.Module, step: int) -> Tensor:
    lengths = torch.tensor([100, 20 * step])
    return model(data(step), lengths).square().mean()


def _with_the_backward(model: nn.Module, step: int) -> Tensor:
    return model(data(step)).float().square().mean()


def _long(model: nn.Module, step: int) -> Tensor:
    return model(data(step, 256 - 16 * step)).square().mean()


def _half_outside(model: nn.Module, step: int) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        out = model(data(step))
    return F.cross_entropy(out.float(), torch.arange(len(out)) % out.shape[1])


def _replaced(model: nn.Module, step: int) -> Tensor:
    activation: Any = nn.ReLU() if step % 2 else nn.SiLU()
    model.layers[3][2] = activation  # type: ignore[index,union-attr]
    return plain_loss(model, step)


def _frozen(model: nn.Module, step: int) -> Tensor:
    for number, layer in enumerate(model.layers):  # type: ignore[arg-type]
        layer.requires_grad_(number >= step)
    return plain_loss(model, step)


def _functional(model: nn.Module, step: int) -> Tensor:
    given = {name: p * 1.0 if step % 2 else p for name, p in model.named_parameters() if "layers.1" in name}
    return torch.func.functional_call(model, given, (data(step),)).square().mean()


PROGRAMS: dict[str, Callable[[], Program]] = {
    "generators": lambda: (OwnGenerator(*layers()), plain_loss),
    "iterators": lambda: (Iterating(*layers()), plain_loss),
    "an index": lambda: (Indexing(*layers()), plain_loss),
    "stochastic depth": lambda: (Dropping(*layers(8)), plain_loss),
    "autocast inside": lambda: (Casting(*layers()), plain_loss),
    "autocast as a decorator": lambda: (Decorated(*layers()), _with_the_backward),
    "raw memory": lambda: (Raw(*layers()), plain_loss),
    "complex": lambda: (Complex(*layers()), plain_loss),
    "sparse": lambda: (Sparse(*layers()), plain_loss),
    "cond": lambda: (Conditional(*layers()), plain_loss),
    "forces": lambda: (Forces(*layers(4)), plain_loss),
    "a number of the data": lambda: (Masked(*layers()), _masked_loss),
    "masks": lambda: (Selecting(*layers()), _selecting_loss),
    "experts": lambda: (Residual(*(Experts() for _ in range(4))), plain_loss),
    "lengths": lambda: (Residual(*layers()), _long),
    "a loss outside": lambda: (
        nn.Sequential(Residual(*layers()), nn.Linear(64, 100)).bfloat16().float(),
        _half_outside,
    ),
    "an activation replaced": lambda: (Residual(*layers(8)), _replaced),
    "freezing": lambda: (Residual(*layers()), _frozen),
    "functional_call": lambda: (Residual(*layers()), _functional),
}


def trained(
    model: nn.Module, run: nn.Module, loss: Callable[[nn.Module, int], Tensor]
) -> tuple[list[Tensor], list[int]]:
    """Losses, gradients and weights of six steps of SGD, and their peaks."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    found: list[Tensor] = []
    peaks: list[int] = []
    torch.manual_seed(1)
    random.seed(1)
    for step in range(STEPS):
        optimizer.zero_grad(set_to_none=False)
        value: list[Tensor] = []

        def forward(step: int = step, value: list[Tensor] = value) -> Tensor:
            value.append(loss(run, step))
            return value[0]

        peaks.append(measure_memory(forward, warm_up=False).peak)
        found += [value[0].detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        optimizer.step()
    return [*found, *model.state_dict().values(), torch.rand(2)], peaks


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # by dynamo, in `torch.cond`
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_budget_is_kept(name: str) -> None:
    torch.manual_seed(0)
    plain, loss = PROGRAMS[name]()
    model = copy.deepcopy(plain)
    want, plain_peaks = trained(plain, plain, loss)
    got, peaks = trained(model, revfx.convert(model, memory=SHARE), loss)
    dense = [t for t in got if t.layout == torch.strided]
    assert equal(dense, [t for t in want if t.layout == torch.strided])
    peaks = peaks[name in LATER :]
    # The graph of a graph is beyond any plan, and layers that were never left out together may take more once.
    bound = {"forces": 1.0, "stochastic depth": 0.75}.get(name, SHARE)
    assert max(peaks) <= bound * max(plain_peaks), [p / max(plain_peaks) for p in peaks]


class Offloading(Residual):
    """Saved-tensor hooks of the model's own around each block, but for the first forward."""

    is_first = True

    def forward(self, x: Tensor) -> Tensor:
        around = contextlib.nullcontext() if self.is_first else torch.autograd.graph.saved_tensors_hooks(_copied, _same)
        self.is_first = False
        for layer in self.layers:
            with around:
                x = x + layer(x)
            assert hooks_around() is None or hooks_around()[0] is not _copied
        return x


def _copied(t: Tensor) -> Tensor:
    return t.detach().clone()


def _same(t: Tensor) -> Tensor:
    return t


@pytest.mark.filterwarnings("ignore::revfx.BudgetWarning")
@pytest.mark.parametrize("kind", [Residual, Offloading])
def test_a_forward_of_an_unknown_way_drops_blocks(kind: type[Residual]) -> None:
    """It leaves no hooks; under hooks of the model's own it drops none."""
    torch.manual_seed(0)
    plain = kind(*map(Caching, layers(8)))
    model = copy.deepcopy(plain)
    want, plain_peaks = trained(plain, plain, plain_loss)
    got, peaks = trained(model, revfx.convert(model, memory=SHARE), plain_loss)
    assert equal(got, want)
    assert not vars(module_hooks)["_global_forward_pre_hooks"]
    assert hooks_around() is None
    assert kind is Offloading or max(peaks) <= SHARE * max(plain_peaks)
