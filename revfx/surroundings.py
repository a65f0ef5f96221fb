"""What a call depends on besides its arguments, taken before it runs and put back around the re-run.

Parameters, buffers and tensors that a function closes over are noted with their version and address, and compared
before the re-run: autograd's own check does not see them under saved-tensor hooks. Buffers that the call may write
are cloned, and the re-run works on the clones, so that it reads what the forward read and leaves what the forward
left; likewise flags and numbers that modules have as attributes, `training` among them. The random state is kept
only for calls that draw.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import types
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from revfx import _torch
from revfx.containers import put_back
from revfx.errors import RegenerationError
from revfx.fingerprint import held


_swapping = threading.RLock()  # two threads that put the same module's buffers back must not overlap
ALWAYS_KEPT = 4096  # elements; a clone of a buffer this small is kept without comparing


@dataclass(slots=True)
class Held:
    """One tensor that a call reads: where it hangs (None for closures), its version, address, and a clone if written.

    `storage` is held so that no other gets its address when `.data` is replaced.
    """

    holder: dict[str, Any] | None
    key: str
    tensor: Tensor
    version: int
    address: int
    storage: object
    clone: Tensor | None

    def changed(self) -> bool:
        """Whether the tensor was written, or its storage swapped, since it was noted."""
        moved = _address(self.tensor) != self.address and not _torch.fsdp_in_use()
        return _torch.version(self.tensor) != self.version or moved


def _address(tensor: Tensor) -> int:
    return tensor.data_ptr() if type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided else 0


def _hold(holder: dict[str, Any] | None, key: str, tensor: Tensor, clone: bool) -> Held:
    if not tensor.is_leaf:  # its graph may lead to the state that holds this
        tensor = tensor.detach().requires_grad_()
    copy = tensor.detach().clone().requires_grad_(tensor.requires_grad) if clone else None
    address = _address(tensor)
    storage = tensor.untyped_storage() if address else None
    return Held(holder, key, tensor, _torch.version(tensor), address, storage, copy)


Attributes = dict[str, Any]
PLAIN = (bool, int, float, str, type(None))
FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial)


@dataclass(slots=True)
class Reads:
    """What a call may read: tensors, and per module its attributes with a copy of those that are `PLAIN`."""

    tensors: list[Held] = field(default_factory=list[Held])
    plain: list[tuple[Attributes, Attributes]] = field(default_factory=list[tuple[Attributes, Attributes]])

    @property
    def cloned(self) -> bool:
        """Whether there is a tensor that the call may write."""
        return any(h.clone is not None for h in self.tensors)


def reads_of(function: Any) -> Reads:
    """What calling `function` may read, of modules, closures, defaults, partials and objects' own attributes.

    A tuple of a function and its arguments is looked through like a closure.
    """
    found = Reads()
    seen: set[int] = set()
    sharded: set[int] = set()
    stack: list[Any] = [function]
    while stack:
        item = stack.pop()
        if isinstance(item, (int, float, str, bytes, type(None), type, types.ModuleType)) or id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, nn.Module):
            stack.extend(_module_reads(item, found, sharded))
        elif isinstance(item, Tensor):
            found.tensors.append(_hold(None, "", item, clone=False))
        elif isinstance(item, functools.partial):
            stack.extend((item.func, item.args, item.keywords))
        elif isinstance(item, types.FunctionType):
            stack.extend(_cells(item))
        elif isinstance(item, types.MethodType):
            stack.extend((item.__func__, item.__self__))
        elif isinstance(item, (list, tuple, set)):
            stack.extend(item)
        elif isinstance(item, dict):
            stack.extend(item.values())
        else:
            own = getattr(item, "__dict__", {}).values()
            stack.extend(v for v in own if isinstance(v, (Tensor, nn.Module, list, tuple, dict)))
    return found


def _module_reads(module: nn.Module, found: Reads, sharded: set[int]) -> list[Any]:
    """What may be read through `module` besides what it holds itself, which is noted: children, and its functions.

    Parameters that FSDP2 swaps by design, of `sharded` modules and those below them, are its own business.
    """
    further: list[Any] = [m for m in _torch.children(module).values() if m is not None]
    if id(module) in sharded or _torch.is_fsdp(module):
        sharded.update(map(id, (module, *further)))
    for key, p in _torch.parameters(module).items():
        if p is not None and id(module) not in sharded:
            found.tensors.append(_hold(_torch.parameters(module), key, p, clone=False))
    for key, b in _torch.buffers(module).items():
        if b is not None:
            found.tensors.append(_hold(_torch.buffers(module), key, b, clone=True))
    plain: dict[str, Any] = {}
    for key, value in vars(module).items():
        if type(value) in PLAIN:
            plain[key] = value
        elif isinstance(value, Tensor):
            found.tensors.append(_hold(vars(module), key, value, clone=True))
        elif isinstance(value, FUNCTIONS):
            further.append(value)
    found.plain.append((vars(module), plain))
    return [*further, *_closure(type(module).forward)]


def _closure(function: Any) -> list[Any]:
    out: list[Any] = []
    for cell in getattr(function, "__closure__", None) or ():
        with contextlib.suppress(ValueError):  # an empty cell
            out.append(cell.cell_contents)
    return out


def _cells(function: types.FunctionType) -> list[Any]:
    named = [function.__globals__[n] for n in function.__code__.co_names if n in function.__globals__]
    tensors = [v for v in named if isinstance(v, (Tensor, nn.Module))]
    return [*_closure(function), *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values(), *tensors]


@dataclass(slots=True)
class Random:
    """The state of the CPU's generator and, where given, of one accelerator's."""

    cpu: Tensor
    device: torch.device | None
    accelerator: Tensor | None

    @staticmethod
    def now(device: torch.device | None) -> Random:
        """The current state."""
        accelerator = torch.get_device_module(device).get_rng_state(device) if device is not None else None
        return Random(torch.get_rng_state(), device, accelerator)

    def restore(self) -> None:
        """None; the generators go on from this state."""
        torch.set_rng_state(self.cpu)
        if self.accelerator is not None:
            torch.get_device_module(self.device).set_rng_state(self.accelerator, self.device)

    def same(self, other: Random) -> bool:
        """Whether nothing was drawn between the two."""
        return torch.equal(self.cpu, other.cpu) and (
            self.accelerator is None or other.accelerator is None or torch.equal(self.accelerator, other.accelerator)
        )


@dataclass(slots=True)
class Surroundings:
    """What one call depended on: what it could read, and the random state where it drew."""

    name: str
    reads: Reads
    random: Random | None = None

    def settle(self) -> None:
        """None; called after the forward call: clones of large buffers that it did not write are let go."""
        for h in self.reads.tensors:
            if h.clone is None or h.clone.numel() <= ALWAYS_KEPT:
                continue
            seen = h.tensor.dim() <= 1 and not _torch.is_fake(h.tensor)
            silent = seen and not torch.equal(h.tensor.detach(), h.clone)  # batch norm bumps no version
            if _torch.version(h.tensor) == h.version and not silent:
                h.clone = None

    @contextlib.contextmanager
    def restored(self) -> Generator[None]:
        """A context in which the call can be run again as it ran; afterwards everything is as it was before.

        Raises:
            RegenerationError: a tensor that the call read was written, or its storage swapped, since.
        """
        with _swapping if self._writes() else contextlib.nullcontext():
            yield from self._restored()

    def _writes(self) -> bool:
        differs = any(now.get(k) != v for now, then in self.reads.plain for k, v in then.items())
        return self.random is not None or self.reads.cloned or differs

    def _restored(self) -> Iterator[None]:
        swapped: list[tuple[dict[str, Any], str, Any]] = []
        attributes = [(holder, dict(holder)) for holder, _ in self.reads.plain]
        containers = held(holder for holder, _ in self.reads.plain)
        random = Random.now(self.random.device) if self.random is not None else None
        for h in self.reads.tensors:
            if h.clone is None and h.changed():
                what = f"`{h.key}` of `{self.name}`" if h.key else f"a tensor that `{self.name}` closes over"
                raise RegenerationError(
                    f"{what} was modified in place (or its `.data` was replaced) between the forward and the"
                    f" backward, so the activations of `{self.name}` can't be regenerated as they were. Run the"
                    " backward before the update, or keep the activations with `revfx.testing.store_activations()`."
                )

        def put_all_back() -> None:
            for holder, key, value in reversed(swapped):
                holder[key] = value
            for holder, before in attributes:
                for key in holder.keys() - before.keys():
                    del holder[key]
                holder.update(before)
            put_back(containers)
            if random is not None:
                random.restore()

        try:
            for h in self.reads.tensors:
                use = h.tensor if h.clone is None else h.clone.detach().clone().requires_grad_(h.clone.requires_grad)
                if h.holder is not None and (h.clone is not None or h.holder.get(h.key) is not h.tensor):
                    swapped.append((h.holder, h.key, h.holder.get(h.key)))
                    h.holder[h.key] = use
            for holder, then in self.reads.plain:
                holder.update(then)
            if self.random is not None:
                self.random.restore()
            yield
        finally:
            try:
                put_all_back()
            except BaseException:  # an interrupt: what is put back twice is as what is put back once
                put_all_back()
                raise


@contextlib.contextmanager
def noted(name: str, function: Any) -> Generator[Surroundings]:
    """A context to call `function` in: what the call depends on.

    Where it may write to buffers, no re-run in another thread puts others in their place meanwhile.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_swapping)
        reads = reads_of(function)
        if not reads.cloned:
            stack.close()
        surroundings = Surroundings(name, reads)
        yield surroundings
        surroundings.settle()
