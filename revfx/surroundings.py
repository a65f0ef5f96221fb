"""What a call depends on besides its arguments, taken before it runs and put back around the re-run.

Parameters, buffers and tensors that a function closes over are noted with their version and address, and compared
before the re-run: autograd's own check does not see them under saved-tensor hooks. Buffers that the call may write
are cloned, and the re-run works on the clones, so that it reads what the forward read and leaves what the forward
left; likewise attributes of modules, `training` among them, variables that a function closes over, globals that it
names, and what lists, dicts, sets and plain objects in all these hold. The random state is kept only for calls that
draw.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import types
import weakref
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from revfx import _torch
from revfx.containers import Held as Contents, content, differ, is_container, is_plain, put_back
from revfx.errors import RegenerationError
from revfx.fingerprint import is_users
from revfx.trees import data_address


_swapping = threading.RLock()  # two threads that put the same module's buffers back must not overlap
ALWAYS_KEPT = 4096  # elements; a clone of a buffer this small is kept without comparing
MOST = 1000  # values in containers that are followed: an object may lead to a data set


@dataclass(slots=True)
class Held:
    """One tensor that a call reads: where it hangs (None for closures), its version, address, and a clone if written.

    `storage` is held so that no other gets its address when `.data` is replaced.
    """

    holder: Any  # a dict or list, by whose `key` it is found
    key: Any
    tensor: Tensor
    version: int
    address: int | None
    storage: object
    clone: Tensor | None
    needs_grad: bool
    probed: nn.Module | None = None  # whose parameter it is, where the clone is there to see whether calls write to it
    by_itself: bool = False  # whether the call wrote to it, and there is no clone

    def changed(self) -> bool:
        """Whether the tensor was written, or its storage swapped, since it was noted."""
        moved = data_address(self.tensor) != self.address and not _torch.fsdp_in_use()
        return _torch.version(self.tensor) != self.version or moved


def _hold(holder: Any, key: Any, tensor: Tensor, clone: bool) -> Held:
    if not tensor.is_leaf:  # its graph may lead to the state that holds this
        tensor = tensor.detach().requires_grad_()
    address = data_address(tensor)
    freed = address == 0 and tensor.numel() > 0  # by FSDP2: there is nothing to be copied
    copy = tensor.detach().clone().requires_grad_(tensor.requires_grad) if clone and not freed else None
    storage = tensor.untyped_storage() if address else None
    return Held(holder, key, tensor, _torch.version(tensor), address, storage, copy, tensor.requires_grad)


Names = dict[str, Any]
PLAIN = (bool, int, float, str, type(None))
FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial)
IMMUTABLE = (int, float, complex, str, bytes, type(None), type, types.ModuleType, types.BuiltinFunctionType)


@dataclass(slots=True)
class Reads:
    """What a call may read: tensors; of modules and globals what some names stand for; and what containers hold."""

    tensors: list[Held] = field(default_factory=list[Held])
    names: list[tuple[Names, Names]] = field(default_factory=list[tuple[Names, Names]])
    modules: list[Names] = field(default_factory=list[Names])
    contents: Contents = field(default_factory=list[tuple[Any, list[Any]]])

    @property
    def cloned(self) -> bool:
        """Whether there is a tensor that the call may write."""
        return any(h.clone is not None for h in self.tensors)


def reads_of(function: Any) -> Reads:
    """What calling `function` may read: of modules, closures, globals, defaults, partials, containers, plain objects.

    A tuple of a function and its arguments is looked through like a closure.
    """
    found, seen, sharded, room = Reads(), set[int](), set[int](), MOST
    stack: list[tuple[Any, Any, Any]] = [(None, "", function)]  # where it hangs, by which key, and what
    while stack:
        holder, key, item = stack.pop()
        if isinstance(item, IMMUTABLE) or id(item) in seen:
            continue
        seen.add(id(item))
        further: list[Any] = []
        if isinstance(item, nn.Module):
            further = _module_reads(item, found, sharded)
        elif isinstance(item, Tensor):
            written = holder is not None and not isinstance(item, nn.Parameter) and not item.requires_grad
            found.tensors.append(_hold(holder, key, item, clone=written))
        elif isinstance(item, functools.partial):
            further = [item.func, item.args, item.keywords]
        elif isinstance(item, types.FunctionType):
            further = _function_reads(item, found)
        elif isinstance(item, types.MethodType):
            further = [item.__func__, item.__self__]
        elif isinstance(item, (tuple, frozenset)):
            further = [*item]
        elif is_container(item) or is_plain(item):
            table = vars(item) if is_plain(item) else item
            held = content(table)
            room -= len(held)
            if room >= 0:
                found.contents.append((table, held))
                pairs = held if isinstance(table, dict) else enumerate(held)
                where = table if isinstance(table, (dict, list)) else None
                stack.extend([(where, k, v) for k, v in pairs if type(v) not in PLAIN])
        else:
            own = getattr(item, "__dict__", {}).values()
            further = [v for v in own if isinstance(v, (Tensor, nn.Module, list, tuple, dict))]
        stack.extend([(None, "", x) for x in further])
    return found


# By module, and whether it trains, the names of its frozen parameters that a first call wrote to: codebooks that are
# averaged. They are too many to be cloned in every call.
_written: weakref.WeakKeyDictionary[nn.Module, dict[bool, set[str]]] = weakref.WeakKeyDictionary()


def _hold_parameter(module: nn.Module, key: str, p: Tensor) -> Held:
    if is_lazy(p):
        raise ValueError(
            f"`{key}` of a {type(module).__name__} is not initialised yet: a lazy module can't be run again as it ran"
            " first. Call the model once under `torch.no_grad()` before it is trained."
        )
    table = _torch.parameters(module)
    known = _written.get(module, {}).get(module.training)
    probing = known is None and not p.requires_grad
    # an embedding with a largest norm scales the rows that it reads
    written = getattr(module, "max_norm", None) is not None or (known is not None and key in known)
    made = _hold(table if type(table) is dict else None, key, p, clone=written or probing)  # not of scripted ones
    made.probed = module if probing else None
    return made


def _module_reads(module: nn.Module, found: Reads, sharded: set[int]) -> list[Any]:
    """What may be read through `module` besides what it holds itself, which is noted: children, and its functions.

    Parameters that FSDP2 swaps by design, of `sharded` modules and those below them, are its own business.
    """
    further: list[Any] = [m for m in _torch.children(module).values() if m is not None]
    if id(module) in sharded or _torch.is_fsdp(module):
        sharded.update(map(id, (module, *further)))
    own = id(module) not in sharded
    for key, p in _torch.parameters(module).items():
        if p is not None and own:
            found.tensors.append(_hold_parameter(module, key, p))
    buffers = _torch.buffers(module)
    for key, b in buffers.items():
        if b is not None:
            found.tensors.append(_hold(buffers if type(buffers) is dict else None, key, b, clone=True))
    names: Names = {}
    for key, value in vars(module).items():
        if type(value) in PLAIN:
            names[key] = value
        elif not is_users(key):
            pass
        elif isinstance(value, Tensor):
            found.tensors.append(_hold(vars(module), key, value, clone=True))
        elif isinstance(value, FUNCTIONS):
            further.append(value)
        elif own and (isinstance(value, tuple) or is_container(value) or is_plain(value)):
            names[key] = value
            further.append(value)
    found.names.append((vars(module), names))
    found.modules.append(vars(module))
    forward = getattr(type(module), "forward", None)  # scripted modules have none
    further += _torch.hooks(module)
    if isinstance(forward, types.FunctionType) and not type(module).__module__.startswith("torch."):
        further += _function_reads(forward, found)
    return further


def _function_reads(function: types.FunctionType, found: Reads) -> list[Any]:
    """What may be read through a function: what it closes over, its defaults, and globals that its code names."""
    cells = [c for c in function.__closure__ or () if not _is_empty(c)]
    found.contents.extend((c, content(c)) for c in cells)
    known = function.__globals__
    named = {n: known[n] for n in _names(function.__code__) if n in known}
    read = {n: v for n, v in named.items() if type(v) in PLAIN or isinstance(v, (Tensor, nn.Module)) or is_container(v)}
    if read:
        found.names.append((known, read))
    beside = [v for v in named.values() if isinstance(v, types.FunctionType) and v.__globals__ is known]
    defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    return [*(c.cell_contents for c in cells), *defaults, *read.values(), *beside]


@functools.lru_cache(maxsize=4096)
def _names(code: types.CodeType) -> tuple[str, ...]:
    """The names that code, and code inside it, reads of globals or attributes."""
    inner = (n for c in code.co_consts if isinstance(c, types.CodeType) for n in _names(c))
    return tuple(dict.fromkeys((*code.co_names, *inner)))


def _is_empty(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is cell
    except ValueError:
        return True


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
            if h.clone is None:
                h.by_itself = _torch.version(h.tensor) != h.version
            if h.clone is None or (h.clone.numel() <= ALWAYS_KEPT and h.probed is None):
                continue
            silent = not _torch.is_fake(h.tensor) and not torch.equal(h.tensor.detach(), h.clone)  # batch norm, `.data`
            unwritten = _torch.version(h.tensor) == h.version and not silent
            if h.probed is not None:
                names = _written.setdefault(h.probed, {}).setdefault(h.probed.training, set())
                names.update(() if unwritten else (h.key,))
                h.probed = None
            if unwritten:
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
        differs = any(_other(now.get(k, self), v) for now, then in self.reads.names for k, v in then.items())
        return self.random is not None or self.reads.cloned or differs or differ(self.reads.contents)

    def _restored(self) -> Iterator[None]:
        swapped: list[tuple[Any, Any, Any]] = []
        attributes = [(holder, dict(holder)) for holder in self.reads.modules]
        names = [(holder, {k: holder[k] for k in then if k in holder}) for holder, then in self.reads.names]
        contents = [(c, content(c)) for c, _ in self.reads.contents]
        random = Random.now(self.random.device) if self.random is not None else None
        turned = [h for h in self.reads.tensors if h.clone is None and h.tensor.requires_grad != h.needs_grad]
        for h in self.reads.tensors:
            if h.clone is None and h.changed():
                raise RegenerationError(_why(self.name, h))

        def put_all_back() -> None:
            for holder, key, value in reversed(swapped):
                holder[key] = value
            for holder, before in attributes:
                for key in holder.keys() - before.keys():
                    del holder[key]
                holder.update(before)
            for holder, before in names:
                holder.update(before)
            put_back(contents)
            for h in turned:
                h.tensor.requires_grad_(not h.needs_grad)
            if random is not None:
                random.restore()

        try:
            for holder, then in self.reads.names:
                holder.update(then)
            put_back(self.reads.contents)
            for h in turned:
                h.tensor.requires_grad_(h.needs_grad)
            for h in self.reads.tensors:
                use = h.tensor if h.clone is None else h.clone.detach().clone().requires_grad_(h.clone.requires_grad)
                now = h.holder[h.key] if isinstance(h.holder, list) else h.holder and h.holder.get(h.key)
                if h.holder is not None and (h.clone is not None or now is not h.tensor):
                    swapped.append((h.holder, h.key, now))
                    h.holder[h.key] = use
            if self.random is not None:
                self.random.restore()
            yield
        finally:
            try:
                put_all_back()
            except BaseException:  # an interrupt: what is put back twice is as what is put back once
                put_all_back()
                raise


def _why(name: str, h: Held) -> str:
    what = f"`{h.key}` of `{name}`" if isinstance(h.key, str) and h.key else f"a tensor that `{name}` closes over"
    if h.by_itself:
        return (
            f"{what} is written in place by `{name}` itself, so its activations can't be regenerated as they were. Keep"
            " what a forward writes in a buffer (`register_buffer`), or the activations with"
            " `revfx.testing.store_activations()`."
        )
    return (
        f"{what} was modified in place (or its `.data` was replaced) between the forward and the backward, so the"
        f" activations of `{name}` can't be regenerated as they were. Run the backward before the update, or keep the"
        " activations with `revfx.testing.store_activations()`."
    )


def _other(now: Any, then: Any) -> bool:
    return now is not then and not (type(then) in PLAIN and type(now) in PLAIN and now == then)


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
