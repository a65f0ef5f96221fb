"""The contenders of `revfx bench`: ways of training one and the same model, each by its own means."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import revfx
from revfx.bench.models import BenchModel, Chain, Coupling
from revfx.compiled import _inductor
from revfx.compiled.dynamo import with_own_code
from revfx.errors import RevfxWarning
from revfx.testing import measure_memory


BUDGETS = (0.2, 0.5)  # of `activation_memory_budget`
Call = Callable[..., Any]
Inputs = tuple[Tensor, ...]
Build = Callable[[BenchModel, Chain, Inputs], Call]


@dataclass(frozen=True)
class Way:
    """One contender: the `name` that `--ways` calls it, and its `title` in tables.

    `build` goes from the description, the model and its arguments to a way of calling it; a warning of revfx's is a
    note. The model's parameters are what it trains, and the model is its own: it may do with it what it likes.
    `library` must be installed, as it is imported; `additive`: it takes chains of additive couplings on two streams
    only; `compiled`: it compiles, which takes its time; `own`: it is revfx's.
    """

    name: str
    title: str
    build: Build
    library: str = ""
    additive: bool = False
    compiled: bool = False
    own: bool = False


def why_not(way: Way, bench: BenchModel) -> str | None:
    """Return why this way can't train this model, or None if it can."""
    if way.additive and bench.otherwise:
        return f"it takes additive couplings on two streams only: {bench.otherwise}"
    if way.library and importlib.util.find_spec(way.library) is None:
        return "not installed: pip install 'revfx[bench]'"
    return None


# --- PyTorch's own
def _checkpoint(bench: BenchModel, model: Chain, inputs: Inputs) -> Call:
    def call(*inputs: Tensor) -> Any:
        state = model.enter(*inputs)
        for block in model.blocks:
            state = checkpoint(block, *state, use_reentrant=False)
        return model.leave(*state)

    return call


_numbers = itertools.count()


def compiled(model: nn.Module, **compile_kwargs: Any) -> Call:
    """Compile `model` with these arguments of `torch.compile`, apart from all other calls.

    Dynamo finds what it compiled by the code object, and what it learnt of sizes by the name, whoever left it there.
    """
    call: Any = with_own_code(model)
    call.__code__ = call.__code__.replace(co_name=f"run_{next(_numbers)}")
    return torch.compile(call, **compile_kwargs)


def _compiled(**compile_kwargs: Any) -> Build:
    return lambda bench, model, inputs: compiled(model, **compile_kwargs)


def _lowest_budget(bench: BenchModel, model: Chain, inputs: Inputs) -> Call:
    calls = {budget: compiled(model) for budget in BUDGETS}
    peaks: dict[float, int] = {}
    for budget, call in calls.items():
        with _inductor.memory_budget(budget):
            peaks[budget] = measure_memory(lambda c=call: bench.loss(c(*inputs)), device=inputs[0].device.type).peak
    lowest = min(BUDGETS, key=lambda b: (peaks[b], -b))
    tried = ", ".join(map(str, BUDGETS))
    warnings.warn(f"`activation_memory_budget` {lowest}, the lower peak of {tried}", RevfxWarning, stacklevel=2)
    return calls[lowest]


# --- libraries of reversible layers
Pairs = Sequence[tuple[nn.Module, nn.Module]]


def _pairs(model: Chain) -> Pairs:
    """Return f and g of each coupling."""
    return [(b.f, b.g) for b in model.blocks if isinstance(b, Coupling)]


def _library(name: str, make: Callable[[Any, Pairs, int], Call], axis: int | None = None) -> Build:
    """Return how to train by a library, which takes the two streams side by side in one tensor.

    `make` gives what runs the couplings, from the library, f and g of each, and the axis along which streams lie;
    `axis` is the only one that the library knows, if its tensors have so many.
    """

    def build(bench: BenchModel, model: Chain, inputs: Inputs) -> Call:
        run = make(importlib.import_module(name), _pairs(model), model.axis)

        def call(*inputs: Tensor) -> Any:
            streams = model.enter(*inputs)
            along = model.axis if axis is None or streams[0].dim() <= axis else axis
            return model.leave(*run(torch.cat(streams, along)).chunk(2, along))

        return call

    return build


def _revlib(revlib: Any, pairs: Pairs, axis: int) -> Call:
    # its first module reads the second stream, adds to the first, and swaps them
    return revlib.ReversibleSequential(*itertools.chain(*pairs), split_dim=axis)


def _memcnn(memcnn: Any, pairs: Pairs, axis: int) -> Call:
    couplings = (memcnn.AdditiveCoupling(f, g, split_dim=axis) for f, g in pairs)
    free: Any = {"keep_input": False, "keep_input_inverse": False}
    return nn.Sequential(*(memcnn.InvertibleModuleWrapper(c, **free) for c in couplings))


def _revtorch(revtorch: Any, pairs: Pairs, axis: int) -> Call:
    blocks = (revtorch.ReversibleBlock(f, g, split_along_dim=axis) for f, g in pairs)
    return revtorch.ReversibleSequence(nn.ModuleList(blocks))


def _reformer(reformer: Any, pairs: Pairs, axis: int) -> Call:
    sequence: Call = reformer.ReversibleSequence(nn.ModuleList(nn.ModuleList(pair) for pair in pairs))
    return lambda x: sequence(x) if x.dim() > 2 else sequence(x[None])[0]  # f and g are given whole streams anyway


# --- revfx
def _rev_block(bench: BenchModel, model: Chain, inputs: Inputs) -> Call:
    fs, gs = zip(*_pairs(model), strict=True)

    def call(*inputs: Tensor) -> Any:
        x1, x2 = model.enter(*inputs)
        return model.leave(*revfx.rev_block(x1, x2, fs, gs, len(fs)))

    return call


WAYS: Mapping[str, Way] = {w.name: w for w in (
    Way("plain", "plain autograd", lambda bench, model, inputs: model),
    Way("checkpoint", "`checkpoint` of each block", _checkpoint),
    Way("inductor", "`torch.compile`", _compiled(), compiled=True),
    Way("inductor-budget", "`torch.compile` with a memory budget", _lowest_budget, compiled=True),
    Way("revlib", "RevLib", _library("revlib", _revlib), "revlib", additive=True),
    Way("memcnn", "MemCNN", _library("memcnn", _memcnn), "memcnn", additive=True),
    Way("revtorch", "RevTorch", _library("revtorch", _revtorch), "revtorch", additive=True),
    Way(
        "reformer", "reformer-pytorch", _library("reformer_pytorch.reversible", _reformer, axis=2), "reformer_pytorch",
        additive=True,
    ),
    Way("convert", "`revfx.convert`", lambda bench, model, inputs: revfx.convert(model), own=True),
    Way("rounding", "`revfx.convert`, `exact=False`", lambda b, model, i: revfx.convert(model, exact=False), own=True),
    Way("rev_block", "`revfx.rev_block`", _rev_block, additive=True, own=True),
    Way("backend", '`backend="revfx"`', _compiled(backend="revfx"), compiled=True, own=True),
    Way(
        "backend-eager", '`backend="revfx"` over eager kernels',
        _compiled(backend="revfx", options={"inner": "aot_eager"}), compiled=True, own=True,
    ),
)}  # fmt: skip
