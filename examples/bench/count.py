"""Counting the kernels of a step as an accelerator would launch them, and the roofline of their time.

Steps run on the CPU under a dispatch mode. An operator launches one kernel, unless it returns a view, allocates, or
answers from a tensor's metadata. A kernel moves the bytes of its distinct operands and results; an expanded dimension
counts once. FLOPs are those of `torch.utils.flop_counter`. revfx runs as on an accelerator: each code, correction or
fingerprint is one fused kernel. Operators that run as other kernels on an
accelerator (attention with dropout, recurrent layers, padding) count as on the CPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from bench.chains import Chain
from bench.models import Task
from bench.ways import ATTENTION, Way
from revfx import _torch, codes
from revfx.codes import codec, implementations
from revfx.engine import dispatch
from revfx.engine.operators import OF_SHAPE, UNINITIALIZED


# revfx measures codes and checks plans in early steps, and in those whose number is a power of two. The step after
# these does neither, whether revfx numbers it 5, 6 or 7.
WARM_UP_STEPS = 6
RNN = "mkldnn_rnn_layer"
OVERWRITES = frozenset(("copy_", "fill_", "zero_"))  # they write their first argument without reading it


# --- cards
@dataclass(frozen=True)
class Card:
    """The peak rates of an accelerator, in SI units.

    Attributes:
        bandwidth: bytes per second, of its memory.
        rate: dense bf16 FLOPs per second, accumulated in float32.
        launch: seconds from the start of an empty kernel to the start of the next one.
    """

    bandwidth: float
    rate: float
    launch: float


# Bandwidths and rates are the vendors': the data sheets of H100 (SXM), A100 (80 GB SXM), H200 (SXM) and MI300X, and
# appendix A of the Ada whitepaper for the RTX 4090. Rates are without sparsity. Vendors publish no launch time. Spector
# et al. (2025), "Look Ma, No Bubbles!", measured 1.3 us in a CUDA graph on an H100. A launch by the host takes longer,
# so 2 us are assumed, for all cards.
CARDS: Mapping[str, Card] = {
    "H100": Card(3.35e12, 989e12, 2e-6),
    "A100": Card(2.039e12, 312e12, 2e-6),
    "H200": Card(4.8e12, 989e12, 2e-6),
    "MI300X": Card(5.3e12, 1307e12, 2e-6),
    "RTX4090": Card(1.008e12, 165.2e12, 2e-6),
}


# --- kernels
@dataclass(frozen=True)
class Kernel:
    """A kernel: the bytes that it reads and writes, and its FLOPs.

    `is_product`: it is a matrix product, attention, a recurrent layer or a convolution.
    """

    name: str
    nbytes: int
    flops: int = 0
    is_product: bool = False

    def seconds(self, card: Card) -> float:
        """Return the least time on a card."""
        return max(self.nbytes / card.bandwidth, self.flops / card.rate, card.launch)


@dataclass(frozen=True)
class Counts:
    """The kernels of one step.

    Attributes:
        kernels: in the order of their launches.
        couplings: the blocks of a chain; 0 for other models.
        elements: of all streams, summed over the couplings.
    """

    kernels: tuple[Kernel, ...]
    couplings: int = 0
    elements: int = 0

    @property
    def launches(self) -> int:
        """The number of kernels."""
        return len(self.kernels)

    @property
    def nbytes(self) -> int:
        """Bytes that all kernels but products read and write."""
        return sum(k.nbytes for k in self.kernels if not k.is_product)

    def seconds(self, card: Card) -> float:
        """Return the roofline's device time."""
        return sum(k.seconds(card) for k in self.kernels)


class KernelLog(TorchDispatchMode):
    """A dispatch mode that notes the kernels of the operators that run under it."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []
        self.is_paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if is_composite(func):
            with self:  # below autograd, a mode that is not entered again would not see its parts
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        if not self.is_paused and is_launched(func, args, kwargs, out):
            self.kernels.append(kernel_of(func, args, kwargs, out))
        return out

    def fused(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that notes one kernel in the place of its operators."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.is_paused:
                return function(*args, **kwargs)
            self.is_paused = True
            try:
                result = function(*args, **kwargs)
            finally:
                self.is_paused = False
            self.kernels.append(Kernel(function.__name__, _bytes_of((*args, *kwargs.values(), result))))
            return result

        return call


@cache
def is_composite(func: Any) -> bool:
    """Return whether an operator has no kernel of its own, and runs other operators."""
    has_kernel: Any = torch._C._dispatch_has_kernel_for_dispatch_key
    return has_kernel(func.name(), "CompositeImplicitAutograd") and not has_kernel(func.name(), "CPU")


def is_launched(func: Any, args: Any, kwargs: Any, out: Any) -> bool:
    """Return whether an operator launches a kernel."""
    if func.overloadpacket.__name__ in UNINITIALIZED or torch.Tag.inplace_view in func.tags:
        return False
    if func._schema.is_mutable:
        return True
    results = _tensors(out)
    if not results:
        return torch.Tag.data_dependent_output in func.tags  # else it reads metadata alone
    memory = {_memory_of(t) for t in _tensors((args, kwargs))}
    return any(_memory_of(t) not in memory for t in results)


def kernel_of(func: Any, args: Any, kwargs: Any, out: Any) -> Kernel:
    """Return the kernel of an operator that ran."""
    packet = func.overloadpacket
    name = packet.__name__
    read: list[Tensor] = []
    written = _tensors(out)
    for position, argument in enumerate(func._schema.arguments):
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        is_read = not (is_written and argument.kwarg_only)  # `out=` is only written
        if position == 0 and (name in OVERWRITES or name in OF_SHAPE):
            is_read = False
        if is_read:
            read += _tensors(value)
        if is_written:
            written += _tensors(value)
    # The CPU's attention has no formula of its own.
    formula = flop_registry.get(getattr(torch.ops.aten, name.replace("_for_cpu", ""), packet))
    flops = 0 if formula is None else int(formula(*args, **kwargs, out_val=out))
    is_product = formula is not None or name.startswith((ATTENTION, RNN))
    return Kernel(name, _bytes_of(read) + _bytes_of(written), flops, is_product)


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor)]


def _bytes_of(values: Iterable[Any]) -> int:
    """Return the bytes of distinct tensors, and of those that predictions and codes hold."""
    distinct: dict[Any, int] = {}
    for value in values:
        for t in _tensors(getattr(value, "tensors", value)):
            distinct[_memory_of(t), t.shape, _layout(t)] = _memory_bytes(t)
    return sum(distinct.values())


def _memory_of(t: Tensor) -> int:
    return _torch.storage_key(t) if t.layout == torch.strided else id(t)


def _layout(t: Tensor) -> Any:
    return (t.storage_offset(), t.stride(), t.dtype) if t.layout == torch.strided else None


def _memory_bytes(t: Tensor) -> int:
    """Return the bytes of a tensor in memory; an expanded dimension counts once."""
    if t.layout != torch.strided:
        return t.numel() * t.element_size()
    nbytes = t.element_size()
    for size, stride in zip(t.shape, t.stride(), strict=True):
        if stride != 0 or size == 0:
            nbytes *= size
    return nbytes


# --- steps
@contextlib.contextmanager
def as_on_accelerators(log: KernelLog) -> Generator[None]:
    """Have revfx run as on an accelerator, and show its operators to `log`.

    The native watcher sees operators below dispatch modes, and would hide those that revfx runs in a forward. So the
    watcher in Python takes its place.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.dict("os.environ", REVFX_WATCH="python"))
        stack.enter_context(patch.object(dispatch, "has_modes", lambda: False))  # or revfx would not run
        stack.enter_context(patch.object(dispatch, "replaying", lambda: _visible(log, dispatch._below_autocast())))
        stack.enter_context(patch.object(dispatch, "unseen", lambda: _visible(log, contextlib.nullcontext())))
        stack.enter_context(patch.object(implementations, "CHOICE", "aten"))
        _fuse_codes(log, stack)
        stack.enter_context(log)
        yield


@contextlib.contextmanager
def _visible(log: KernelLog, context: Any) -> Generator[None]:
    """Open a context of the engine in which `log` sees operators, and no other dispatch mode does."""
    with dispatch.outside(), log, context:
        yield


def _fuse_codes(log: KernelLog, stack: contextlib.ExitStack) -> None:
    """Count codes, corrections and fingerprints as fused kernels; the host does not know the number of escapes."""
    for module, name in ((codec, "encode"), (codes, "decode"), (codes, "fingerprint")):
        stack.enter_context(patch.object(module, name, log.fused(getattr(module, name))))
    stack.enter_context(patch.object(codec, "is_counted", lambda t: False))


def count(task: Task, way: Way, setting: Any) -> Counts:
    """Count the kernels of one step, after `WARM_UP_STEPS`.

    Args:
        task: the model to train, on the CPU.
        way: the way to train it; none that compiles.
        setting: of the way.
    """
    log = KernelLog()
    torch.manual_seed(0)
    with as_on_accelerators(log):
        call = way.build(task, setting)
        for _ in range(WARM_UP_STEPS + 1):
            task.model.zero_grad(set_to_none=False)
            log.kernels.clear()
            task.loss_of(call).backward()
    kernels = tuple(log.kernels)
    if not isinstance(task.model, Chain):
        return Counts(kernels)
    couplings = len(task.model.blocks)
    with torch.no_grad():
        streams = task.model.enter(*task.args)
    return Counts(kernels, couplings, couplings * sum(t.numel() for t in streams))
