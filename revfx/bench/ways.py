"""The contenders of `revfx bench`: ways of training one and the same model, each by its own means."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import revfx
from revfx.bench.models import BenchModel, Chain
from revfx.testing import measure_memory


BUDGETS = (0.2, 0.5)  # of `activation_memory_budget`
Call = Callable[..., Any]
Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Built:
    """A way of calling a model: from the arguments of its forward to its output."""

    call: Call
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Way:
    """One contender.

    Args:
        name: what `--ways` calls it.
        title: what it is, in tables.
        build: from the description, the model and its arguments to a way of calling it. The model's parameters are
            what it trains, and the model is its own: it may do with it what it likes.
        library: what must be installed, as it is imported.
        additive: it takes chains of additive couplings on two streams only.
        compiled: it compiles, which takes its time.
        own: it is revfx's.
    """

    name: str
    title: str
    build: Callable[[BenchModel, Chain, Inputs], Built]
    library: str = ""
    additive: bool = False
    compiled: bool = False
    own: bool = False


def why_not(way: Way, bench: BenchModel) -> str | None:
    """Return why this way can't train this model, or None if it can."""
    if way.additive and bench.couplings is None:
        return f"it takes additive couplings on two streams only: {bench.otherwise}"
    if way.library and not _installed(way.library):
        return "not installed: pip install 'revfx[bench]'"
    return None


def _installed(library: str) -> bool:
    try:
        return importlib.util.find_spec(library) is not None
    except ValueError:  # what stands for it in `sys.modules` has no spec
        return False


# --- PyTorch's own
def _plain(bench: BenchModel, model: Chain, inputs: Inputs) -> Built:
    return Built(model)


def _checkpoint(bench: BenchModel, model: Chain, inputs: Inputs) -> Built:
    def call(*inputs: Tensor) -> Any:
        state = model.enter(*inputs)
        for block in model.blocks:
            state = checkpoint(block, *state, use_reentrant=False)
        return model.leave(*state)

    return Built(call)


_numbers = itertools.count()


def compiled(model: nn.Module, **compile_kwargs: Any) -> Call:
    """Compile `model` with these arguments of `torch.compile`, apart from all other calls.

    Dynamo keeps what it compiled by code object, and finds there what another backend or setting has left.
    """

    def forward(*inputs: Tensor) -> Any:
        return model(*inputs)

    code = forward.__code__.replace(co_name=f"forward_{next(_numbers)}")
    return torch.compile(types.FunctionType(code, globals(), None, None, forward.__closure__), **compile_kwargs)


def _inductor(bench: BenchModel, model: Chain, inputs: Inputs) -> Built:
    return Built(compiled(model))


def _lowest_budget(bench: BenchModel, model: Chain, inputs: Inputs) -> Built:
    from revfx.compiled import _inductor as _compile

    calls: dict[float, Call] = {}
    peaks: dict[float, int] = {}
    for budget in BUDGETS:
        calls[budget] = call = compiled(model)
        with _compile.memory_budget(budget):
            peaks[budget] = measure_memory(lambda c=call: bench.loss(c(*inputs)), device=inputs[0].device.type).peak
    lowest = min(BUDGETS, key=lambda b: (peaks[b], -b))
    return Built(
        calls[lowest], (f"`activation_memory_budget` {lowest}, the lower peak of {', '.join(map(str, BUDGETS))}",)
    )


# --- libraries of reversible layers: each takes the two streams side by side in one tensor
def _between(model: Chain, run: Call, axis: int | None = None) -> Built:
    """Return the model with its chain of blocks run by `run`, from streams that lie side by side to the same."""
    along = model.axis if axis is None else axis

    def call(*inputs: Tensor) -> Any:
        return model.leave(*run(torch.cat(model.enter(*inputs), along)).chunk(2, along))

    return Built(call)


def _functions(bench: BenchModel, model: Chain) -> tuple[list[nn.Module], list[nn.Module]]:
    if bench.couplings is None:
        raise ValueError(bench.otherwise)
    return bench.couplings(model)


def _revlib(bench: BenchModel, model: Chain, inputs: Inputs) -> Built:
    revlib: Any = importlib.import_module("revlib")
    fs, gs = _functions(bench, model)
    # revlib's first module reads the second stream, adds to the first, and swaps them
    layers = [m for pair in zip(fs, gs, strict=True) for m in pair]
    return _between(model, revlib.ReversibleSequential(*layers, split_dim=model.axis))


def _memcnn(bench: BenchModel, model: Chain, inputs: Inputs) -> Built:
    memcnn: Any = importlib.import_module("memcnn")
    pairs = zip(*_functions(bench, model), strict=True)
    couplings = [memcnn.AdditiveCoupling(f, g, split_dim=model.axis) for f, g in pairs]
    blocks = [memcnn.InvertibleModuleWrapper(c, keep_input=False, keep_input_inverse=False) for c in couplings]
    return _between(model, nn.Sequential(*blocks))


def _revtorch(bench: BenchModel, model: Chain, inputs: Inputs) -> Built:
    revtorch: Any = importlib.import_module("revtorch")
    pairs = zip(*_functions(bench, model), strict=True)
    blocks = [revtorch.ReversibleBlock(f, g, split_along_dim=model.axis) for f, g in pairs]
    return _between(model, revtorch.ReversibleSequence(nn.ModuleList(blocks)))


def _reformer(bench: BenchModel, model: Chain, inputs: Inputs) -> Built:
    reformer: Any = importlib.import_module("reformer_pytorch.reversible")
    pairs = list(zip(*_functions(bench, model), strict=True))
    sequence: Call = reformer.ReversibleSequence(nn.ModuleList(nn.ModuleList(pair) for pair in pairs))
    with torch.no_grad():
        dims = model.enter(*inputs)[0].dim()
    if dims > 2:
        return _between(model, sequence, axis=2)  # it splits along no other; f and g are given whole streams anyway
    return _between(model, lambda x: sequence(x[None])[0])


# --- revfx
def _convert(bench: BenchModel, model: Chain, inputs: Inputs) -> Built:
    return Built(revfx.convert(model))


def _rev_block(bench: BenchModel, model: Chain, inputs: Inputs) -> Built:
    fs, gs = _functions(bench, model)

    def call(*inputs: Tensor) -> Any:
        x1, x2 = model.enter(*inputs)
        return model.leave(*revfx.rev_block(x1, x2, fs, gs, len(fs)))

    return Built(call)


def _backend(bench: BenchModel, model: Chain, inputs: Inputs) -> Built:
    return Built(compiled(model, backend="revfx"))


def _backend_eager(bench: BenchModel, model: Chain, inputs: Inputs) -> Built:
    return Built(compiled(model, backend="revfx", options={"inner": "aot_eager"}))


_ALL = (
    Way("plain", "plain autograd", _plain),
    Way("checkpoint", "`checkpoint` of each block", _checkpoint),
    Way("inductor", "`torch.compile`", _inductor, compiled=True),
    Way("inductor-budget", "`torch.compile` with a memory budget", _lowest_budget, compiled=True),
    Way("revlib", "RevLib", _revlib, library="revlib", additive=True),
    Way("memcnn", "MemCNN", _memcnn, library="memcnn", additive=True),
    Way("revtorch", "RevTorch", _revtorch, library="revtorch", additive=True),
    Way("reformer", "reformer-pytorch", _reformer, library="reformer_pytorch", additive=True),
    Way("convert", "`revfx.convert`", _convert, own=True),
    Way("rev_block", "`revfx.rev_block`", _rev_block, additive=True, own=True),
    Way("backend", '`backend="revfx"`', _backend, compiled=True, own=True),
    Way("backend-eager", '`backend="revfx"` over eager kernels', _backend_eager, compiled=True, own=True),
)
WAYS: Mapping[str, Way] = {w.name: w for w in _ALL}
