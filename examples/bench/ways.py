"""The ways to train one model that the bench compares."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import itertools
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import revfx
from bench.chains import Chain, Coupling
from bench.models import Task
from revfx.errors import BudgetError, RevfxError


Call = Callable[..., Any]
LEAST = "least"  # the least feasible budget
ROUNDING = 1e-2  # the largest relative error of a float32 gradient that is taken for rounding
MATMULS = {"mm", "addmm", "bmm", "baddbmm", "convolution", "mkldnn_rnn_layer"}
ATTENTION = "_scaled_dot_product_"


@dataclass(frozen=True)
class Way:
    """One way to train, with a row in the table for each of its settings.

    Attributes:
        name: the name that `--ways` takes.
        title: the name in the table; `{}` stands for the setting.
        build: makes a call of the forward from a task of its own and a setting.
        settings: numbers such as budgets.
        library: the package that it needs.
        is_additive: takes only chains of additive couplings on two streams.
        compiles: "model", "parts" of it, or "". A backward of a whole compiled model holds the new gradients of all
            parameters until it ends.
        compiles_blocks: compiles each block by itself if the task asks for that.
        limit: the largest relative error of a gradient against plain's; more is a failure. 0: bit for bit. None for
            other people's ways: the error is reported.
    """

    name: str
    title: str
    build: Callable[[Task, Any], Call]
    settings: tuple[Any, ...] = (None,)
    library: str = ""
    is_additive: bool = False
    compiles: str = ""
    compiles_blocks: bool = False
    limit: float | None = None

    def missing(self) -> str:
        """Return the message for a package that is not installed, or ""."""
        return missing(self.library, "revfx[bench]")

    def refusal(self, task: Task) -> str:
        """Return the reason why this way can't train the model, or ""."""
        if self.is_additive and not (isinstance(task.model, Chain) and _pairs(task.model)):
            return "takes additive couplings on two streams only"
        return self.missing()


def missing(library: str, extra: str) -> str:
    """Return the message for a package that is not installed, or ""."""
    if not library or importlib.util.find_spec(library) is not None:
        return ""
    return f"`{library}` is not installed: pip install '{extra}'"


# --- torch's own
def _plain(task: Task, setting: None) -> Call:
    if task.is_compiled:
        for block in task.blocks:
            block.forward = _compile_function(block.forward)
    return task.model


def _compile_function(function: Call) -> Call:
    def run(*args: Any, **kwargs: Any) -> Any:  # dynamo skips frames of torch.nn, but not this one
        return function(*args, **kwargs)

    return torch.compile(run, dynamic=False)


def _checkpoint(task: Task, every: int, **options: Any) -> Call:
    """Run one of every so many blocks under a checkpoint."""
    for block in task.blocks[::every]:
        forward = type(block).forward

        def call(self: Any, *args: Any, forward: Any = forward, **kwargs: Any) -> Any:
            return checkpoint(forward, self, *args, use_reentrant=False, **options, **kwargs)

        block.forward = types.MethodType(call, block)
    return task.model


def _selective(task: Task, setting: None) -> Call:
    """Save matrix products, convolutions and attention of each block, and recompute the rest."""

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        name = getattr(op, "overloadpacket", op).__name__
        is_saved = name in MATMULS or name.startswith(ATTENTION)
        return CheckpointPolicy.MUST_SAVE if is_saved else CheckpointPolicy.PREFER_RECOMPUTE

    return _checkpoint(task, 1, context_fn=partial(create_selective_checkpoint_contexts, policy))


def _compile(task: Task, setting: None, backend: str = "inductor", **options: Any) -> Call:
    return torch.compile(task.model, backend=backend, dynamic=False, options=options or None)


def _compile_within(task: Task, budget: float, backend: str) -> Call:
    """Compile with torch's `activation_memory_budget`."""
    from torch._functorch import config

    compiler = torch._dynamo.lookup_backend(backend)

    # an object of its own for each budget: dynamo shares code that one backend compiled
    def compile_graph(graph: Any, inputs: Any) -> Any:
        with config.patch(activation_memory_budget=budget):
            return compiler(graph, inputs)

    return torch.compile(task.model, backend=compile_graph, dynamic=False)


# --- libraries of reversible layers
Pairs = Sequence[tuple[nn.Module, nn.Module]]


def _pairs(model: Chain) -> Pairs:
    """Return f and g of each coupling."""
    return [(block.f, block.g) for block in model.blocks if isinstance(block, Coupling)]


def _library(
    name: str, make: Callable[[Any, Pairs, int], Call], axis: int | None = None
) -> Callable[[Task, None], Call]:
    """Make a builder for a library that takes both streams side by side in one tensor.

    Args:
        name: the module to import.
        make: makes a call of all couplings from that module, f and g of each, and the axis along which streams lie.
        axis: the only axis that the library knows, if tensors have that many; default: the model's own.
    """

    def build(task: Task, setting: None) -> Call:
        model: Any = task.model
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
    return lambda x: sequence(x) if x.dim() > 2 else sequence(x[None])[0]


# --- revfx
def _convert(task: Task, setting: None, **options: Any) -> Call:
    return revfx.convert(task.model, **options)


def _rev_block(task: Task, setting: None) -> Call:
    model: Any = task.model
    fs, gs = zip(*_pairs(model), strict=True)

    def call(*inputs: Tensor) -> Any:
        x1, x2 = model.enter(*inputs)
        return model.leave(*revfx.rev_block(x1, x2, fs, gs, len(fs)))

    return call


def _memory(task: Task, budget: float | str) -> Call:
    """Train within a percentage of plain's peak, or within the least feasible budget."""
    if budget != LEAST:
        return revfx.convert(task.model, memory=float(budget) / 100, compile=task.is_compiled)
    try:
        call = revfx.convert(copy.deepcopy(task.model), memory=1, compile=task.is_compiled)
        for _ in range(2):  # where couplings are to be inverted, the second one is planned
            task.loss_of(call).backward()
    except BudgetError as e:
        task.budget_bytes = e.least
    else:
        raise RevfxError("there is no least budget: the forward can't be recorded")
    return revfx.convert(task.model, memory=task.budget_bytes, compile=task.is_compiled)


WAYS: Mapping[str, Way] = {w.name: w for w in (
    Way("plain", "plain autograd", _plain, compiles_blocks=True, limit=0),
    Way("checkpoint", "`checkpoint` of 1 block in {}", _checkpoint, (1, 2, 3)),
    Way("selective", "selective `checkpoint` of each block", _selective),
    Way("inductor", "`torch.compile`", _compile, compiles="model"),
    Way(
        "inductor-budget", "`torch.compile`, `activation_memory_budget` {}",
        partial(_compile_within, backend="inductor"), (0.5, 0.2), compiles="model",
    ),
    Way(
        "torch-budget", "`activation_memory_budget` {}, eager kernels", partial(_compile_within, backend="aot_eager"),
        (0.7, 0.5, 0.3, 0.15, 0.05), compiles="model",
    ),
    Way("revlib", "RevLib", _library("revlib", _revlib), library="revlib", is_additive=True),
    Way("memcnn", "MemCNN", _library("memcnn", _memcnn), library="memcnn", is_additive=True),
    Way("revtorch", "RevTorch", _library("revtorch", _revtorch), library="revtorch", is_additive=True),
    Way(
        "reformer", "reformer-pytorch", _library("reformer_pytorch.reversible", _reformer, axis=2),
        library="reformer_pytorch", is_additive=True,
    ),
    Way("convert", "`revfx.convert`", _convert, limit=0),
    Way("rounding", "`revfx.convert`, `exact=False`", partial(_convert, exact=False), limit=ROUNDING),
    Way(
        "convert-compiled", "`revfx.convert`, `compile=True`", partial(_convert, compile=True),
        compiles="parts", limit=ROUNDING,
    ),
    Way("rev_block", "`revfx.rev_block`", _rev_block, is_additive=True, limit=0),
    Way("memory", "`revfx.convert`, `memory` {}", _memory, (80, 60, 40, 20, LEAST), compiles_blocks=True, limit=0),
    Way("backend", '`backend="revfx"`', partial(_compile, backend="revfx"), compiles="model", limit=ROUNDING),
    Way(
        "backend-eager", '`backend="revfx"` over eager kernels', partial(_compile, backend="revfx", inner="aot_eager"),
        compiles="model", limit=ROUNDING,
    ),
)}  # fmt: skip
