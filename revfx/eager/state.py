"""What a call of f depends on besides its arguments: noted before it runs, put back around its re-run, and checked.

The contract is that of `torch.utils.checkpoint`, and more than it restores. Put back are the random state, the buffers
that f writes, `training` and the plain attributes of the modules that f reaches, lists and dicts in them one level
deep. Parameters, other buffers and tensors that f closes over must be at the backward what they were in the forward:
versions, addresses and identities are compared. All else that f reads must be constant.

What f reaches are the modules below it, and what a function closes over, its partial arguments and the globals that it
loads lead to, through containers and plain objects.
"""

from __future__ import annotations

import dis
import functools
import sys
import threading
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from operator import is_, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from revfx import _torch
from revfx.errors import RegenerationError


DEPTH = 4  # how far containers, closures and plain objects are followed to modules and tensors
LONG = 1_000  # entries of a container that is data, and not looked through
CONTAINERS = (list, dict, set, deque)
_INNER = frozenset(vars(nn.Module())) - {"training"}  # torch's own tables in `vars(module)`
_ATOMS = frozenset({bool, int, float, complex, str, type(None), torch.dtype, torch.device, type})


EMPTY = object()


def is_users(name: str) -> bool:
    """Return whether an attribute of this name in `vars(module)` is the user's, or `training`."""
    return name not in _INNER


@functools.lru_cache(maxsize=1024)
def global_names(code: types.CodeType) -> frozenset[str]:
    """Return the names of the globals that code, or a function inside it, loads."""
    own = (i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME"))
    return frozenset(own).union(*(global_names(c) for c in code.co_consts if isinstance(c, types.CodeType)))


def closed_over(function: types.FunctionType) -> Iterator[Any]:
    """Return what the variables that a function closes over hold."""
    return (held for cell in function.__closure__ or () if (held := held_in(cell)) is not EMPTY)


# --- random state
class Random:
    """The state of the CPU's generator, and of those of the accelerators that a region computes on."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self.cpu = torch.get_rng_state().view(torch.int64)  # which compares faster than bytes
        self.others = [(d, torch.get_device_module(d).get_rng_state(d)) for d in devices]

    def restore(self) -> None:
        """Make the generators go on from this state."""
        torch.set_rng_state(self.cpu.view(torch.uint8))
        for device, state in self.others:
            torch.get_device_module(device).set_rng_state(state, device)

    def same(self, other: Random) -> bool:
        """Return whether nothing was drawn between the two."""
        return torch.equal(self.cpu, other.cpu) and all(
            torch.equal(mine, theirs) for (_, mine), (_, theirs) in zip(self.others, other.others, strict=True)
        )


# --- what a function reaches
class _Layout(NamedTuple):
    """Which attributes of a module are the user's, and how to read all of them at once."""

    size: int
    keys: tuple[str, ...]
    read: Callable[[dict[str, Any]], tuple[Any, ...]]


class _Written:
    """The buffers of one module that its forward was seen to write, by whether it trains; looked for in the first call
    of each kind. `lock`: while a re-run has the old ones in place, no forward may write to them.
    """

    def __init__(self) -> None:
        self.names: dict[bool, frozenset[str]] = {}
        self.lock = threading.RLock()


_written: weakref.WeakKeyDictionary[nn.Module, _Written] = weakref.WeakKeyDictionary()
_layouts: weakref.WeakKeyDictionary[nn.Module, _Layout] = weakref.WeakKeyDictionary()


def _layout(module: nn.Module, table: dict[str, Any]) -> _Layout:
    known = _layouts.get(module)
    if known is None or known.size != len(table) or not all(map(table.__contains__, known.keys)):
        keys = tuple(k for k in table if k not in _INNER)
        get = itemgetter(*keys)
        known = _layouts[module] = _Layout(len(table), keys, get if len(keys) > 1 else lambda d: (get(d),))
    return known


class Reach:
    """The modules and tensors that a function can see.

    Raises:
        ValueError: a lazy module is among them.
    """

    def __init__(self, function: Any) -> None:
        self.modules: dict[int, nn.Module] = {}
        self.tensors: list[Tensor] = []
        self.cells: list[types.CellType] = []  # variables that a function closes over, such as one of a loop
        level, seen = [function], set[int]()
        for depth in range(DEPTH, -1, -1):
            found = list[Any]()
            for item in level:
                if id(item) not in seen:
                    seen.add(id(item))
                    found.extend(self._visit(item, depth))
            level = found
        self.parameters: list[dict[str, Any]] = []
        self.buffers: list[tuple[nn.Module, _Written]] = []
        swapped = {id(x) for m in self.modules.values() if _torch.is_fsdp(m) for x in m.modules()}
        for m in self.modules.values():
            if _torch.buffers(m):
                self.buffers.append((m, _written.setdefault(m, _Written())))
            if (parameters := _torch.parameters(m)) and id(m) not in swapped:  # FSDP2 gathers them for each call
                self.parameters.append(parameters)
                lazy = next((name for name, p in parameters.items() if p is not None and is_lazy(p)), None)
                if lazy is not None:
                    raise ValueError(
                        f"`{lazy}` of a {type(m).__name__} is not initialised yet: a lazy module can't be run again as"
                        " it ran first. Call the model once under `torch.no_grad()` before it is trained."
                    )

    def needs_grad(self) -> bool:
        """Return whether any of the tensors requires a gradient."""
        held = (p for table in self.parameters for p in table.values() if p is not None)
        return any(t.requires_grad for t in (*self.tensors, *held))

    def _visit(self, item: Any, depth: int) -> Iterable[Any]:
        """Note `item`, and return what is to be looked at behind it."""
        if isinstance(item, nn.Module):
            return self._module(item)
        if isinstance(item, Tensor):
            # of one with a history, a leaf that shares its version: the graph may lead to the state that holds this
            self.tensors.append(item if item.is_leaf else item.detach().requires_grad_())
        elif depth == 0:
            return ()
        elif isinstance(item, functools.partial):
            return item.func, *item.args, *item.keywords.values()
        elif isinstance(item, types.MethodType):
            return item.__self__, item.__func__
        elif isinstance(item, types.FunctionType):
            # what torch's and revfx's own close over may be the user's
            known = {} if _top(item) in ("torch", "revfx") else item.__globals__
            self.cells += item.__closure__ or ()
            return *closed_over(item), *(known[n] for n in global_names(item.__code__) if n in known)
        elif isinstance(item, (*CONTAINERS, tuple)):
            return _items(item)
        elif not isinstance(item, type) and _top(type(item)) not in sys.stdlib_module_names | {"torch"}:
            return _items(getattr(item, "__dict__", ()))
        return ()

    def _module(self, module: nn.Module) -> list[Any]:
        further = list[Any]()
        stack = [module]
        while stack:
            m = stack.pop()
            if id(m) not in self.modules:
                self.modules[id(m)] = m
                table = vars(m)
                further += [v for v in _layout(m, table).read(table) if type(v) not in _ATOMS]
                stack.extend(c for c in _torch.children(m).values() if c is not None)
        return further


def _top(item: Any) -> str:
    return str(item.__module__ or "").partition(".")[0]


def _items(container: Any) -> Iterable[Any]:
    if not isinstance(container, (*CONTAINERS, tuple)) or len(container) > LONG:
        return ()
    return [*container.values()] if isinstance(container, dict) else [*container]


# --- one call
# The table that holds a tensor (None: it is closed over) and its name there, the tensor, its version and address, and
# whether it needs a gradient.
Version = tuple[dict[str, Any] | None, str, Tensor, int, int | None, bool]
Attributes = tuple[dict[str, Any], tuple[str, ...], tuple[Any, ...], int]  # a table, names, values, its size


class CallState:
    """What one call depends on, noted as it begins; `random` is set where it drew.

    `attributes` are tables with names, values and sizes; `contents` containers, and `cells` variables, with what was in
    them; `buffers` those that the call may write: table, name, tensor, version and a copy; `versions` the tensors that
    must not change.
    """

    __slots__ = ("attributes", "buffers", "cells", "contents", "learns", "locks", "name", "random", "reach", "versions")

    def __init__(self, name: str, reach: Reach) -> None:
        self.name, self.reach = name, reach
        self.random: Random | None = None
        self.locks: list[Any] = []
        self.attributes: list[Attributes] = []
        self.contents: list[tuple[Any, tuple[Any, ...]]] = []
        self.cells = [(c, held) for c in reach.cells if (held := held_in(c)) is not EMPTY]
        for module in reach.modules.values():
            self._note_attributes(module)
        self.buffers: list[tuple[dict[str, Any], str, Tensor, int, Tensor]] = []
        self.learns: list[tuple[_Written, bool, int]] = []
        self.versions = [_version(None, "", t) for t in reach.tensors]
        for table in reach.parameters:
            self.versions += [_version(table, k, p) for k, p in table.items() if p is not None]
        for module, written in reach.buffers:
            self._note_buffers(module, written)

    def _note_attributes(self, module: nn.Module) -> None:
        table = vars(module)
        size, names, read = _layout(module, table)
        values = read(table)
        if not _ATOMS.issuperset(map(type, values)):
            held = [v for v in values if isinstance(v, CONTAINERS) and len(v) <= LONG]
            self.contents += [(c, _bare(content(c))) for c in held]
            values = _bare(values)
        self.attributes.append((table, names, values, size))

    def _note_buffers(self, module: nn.Module, written: _Written) -> None:
        table, names = _torch.buffers(module), written.names.get(module.training)
        if names is None or names:
            written.lock.acquire()
            self.locks.append(written.lock)
        if names is None:
            self.learns.append((written, module.training, len(self.buffers)))
        for name, b in table.items():
            if b is not None and (names is None or name in names):
                self.buffers.append((table, name, b, _torch.version(b), b.detach().clone()))
            elif b is not None:
                self.versions.append(_version(table, name, b))

    def settle(self, returned: bool) -> None:
        """Let go of the locks, as the call has ended; where it was the first of its kind, and `returned`, learn which
        buffers it wrote, and let go of the copies of the others.
        """
        if returned and self.learns:
            wrote = [_wrote(*b[2:]) for b in self.buffers]
            ends = [*(at for _, _, at in self.learns[1:]), len(wrote)]
            for (written, training, start), stop in zip(self.learns, ends, strict=True):
                if any(wrote[start:stop]):  # statistics may come out as they were, as of zeros: no sign of what follows
                    wrote[start:stop] = [wrote[i] or self.buffers[i][2].dim() == 1 for i in range(start, stop)]
                mine = zip(self.buffers[start:stop], wrote[start:stop], strict=True)
                written.names[training] = frozenset(name for (_, name, *_), did in mine if did)
            self.versions += [_version(*b[:3]) for b, did in zip(self.buffers, wrote, strict=True) if not did]
            self.buffers = [b for b, did in zip(self.buffers, wrote, strict=True) if did]
        if returned and self.reach.buffers:  # what only later calls write, as after a warm-up
            late = [v for v in self.versions if _torch.version(v[2]) != v[3]]
            for module, written in self.reach.buffers if late else ():
                names = {name for table, name, *_ in late if table is _torch.buffers(module)}
                written.names[module.training] = written.names.get(module.training, frozenset[str]()) | names
        while self.locks:
            self.locks.pop().release()

    def put_back(self) -> Callable[[], None]:
        """Put all back as it was when the call began, and return what puts things as they are now.

        Raises:
            RegenerationError: a tensor that must not change did.
        """
        locks = [w.lock for _, w in self.reach.buffers] if self.buffers else []
        for lock in locks:
            lock.acquire()
        moves = _torch.fsdp_in_use()  # it frees and gathers storages by design
        tables = [(t, t.copy()) for t, *_ in self.attributes]
        contents = [(c, content(c)) for c, _ in self.contents]
        cells = [(c, now) for c, then in self.cells if (now := held_in(c)) is not then]
        swapped: list[tuple[dict[str, Any], str, Any]] = []
        turned: list[tuple[Tensor, bool]] = []
        random = None if self.random is None else Random([d for d, _ in self.random.others])

        def undo() -> None:
            for table, name, t in reversed(swapped):
                table[name] = t
            for table, then in tables:
                for name in table.keys() - then.keys():
                    del table[name]
                table.update(then)
            for container, then in contents:
                fill(container, then)
            for cell, now in cells:
                if now is EMPTY:
                    del cell.cell_contents
                else:
                    cell.cell_contents = now
            for t, needs in turned:
                t.requires_grad_(not needs)
            if random is not None:
                random.restore()

        def undo_whatever_comes() -> None:
            try:
                undo()
            except BaseException:  # an interrupt: what is put back twice is as what is put back once
                undo()
                raise
            finally:
                while locks:
                    locks.pop().release()

        try:
            for table, name, t, version, address, needs in self.versions:
                if _torch.version(t) != version or (_torch.data_address(t) != address and not moves):
                    raise RegenerationError(self._changed(name))
                if t.requires_grad != needs:
                    turned.append((t, needs))
                    t.requires_grad_(needs)
                if table is not None and (now := table.get(name)) is not t:
                    swapped.append((table, name, now))
                    table[name] = t
            for table, names, values, size in self.attributes:
                if len(table) != size or not all(map(is_, map(table.get, names), values)):
                    for name in [n for n in table if n not in names and n not in _INNER]:
                        del table[name]
                    table.update(zip(names, values, strict=True))
            for container, then in self.contents:
                fill(container, then)
            for cell, then in self.cells if cells else ():
                cell.cell_contents = then
            for table, name, _, _, copy in self.buffers:
                swapped.append((table, name, table.get(name)))
                table[name] = copy.clone().requires_grad_(copy.requires_grad)
            if self.random is not None:
                self.random.restore()
        except BaseException:
            undo_whatever_comes()
            raise
        return undo_whatever_comes

    def _changed(self, name: str) -> str:
        what = f"`{name}` of `{self.name}`" if name else f"a tensor that `{self.name}` closes over"
        return (
            f"{what} was modified in place (or its `.data` was replaced) between the forward and the backward, or by"
            f" `{self.name}` itself, so its activations can't be regenerated as they were. Run the backward before the"
            " update, keep what a forward writes in a buffer (`register_buffer`), or keep the activations with"
            " `revfx.testing.store_activations()`."
        )


def _bare(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return `values` with tensors without their history, which may lead to the state that would hold them."""
    return tuple([_detached(v) for v in values])


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor) and not value.is_leaf:
        return value.detach().requires_grad_()
    if type(value) is not tuple:
        return value
    made = _bare(value)
    return value if all(map(is_, made, value)) else made


def _version(table: dict[str, Any] | None, name: str, t: Tensor) -> Version:
    return table, name, t, _torch.version(t), _torch.data_address(t), t.requires_grad


def _wrote(buffer: Tensor, version: int, copy: Tensor) -> bool:
    """Return whether a call wrote to a buffer of which there is a copy; a normalisation's kernel does not count it."""
    silent = not _torch.is_fake(buffer) and not torch.equal(buffer.detach(), copy)
    return silent or _torch.version(buffer) != version


def held_in(cell: types.CellType) -> Any:
    """Return what a variable of a closure holds; EMPTY where it is not assigned."""
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return EMPTY


def content(container: Any) -> tuple[Any, ...]:
    """Return what a container holds; of a dict its pairs."""
    return tuple(container.items() if isinstance(container, dict) else container)


def holds(container: Any, then: tuple[Any, ...]) -> bool:
    """Return whether a container holds the objects that it held."""
    now = content(container)
    return len(now) == len(then) and all(map(_same, now, then))


def fill(container: Any, then: tuple[Any, ...]) -> None:
    """Make a container hold what it held."""
    if not holds(container, then):
        container.clear()
        (container.update if isinstance(container, (dict, set)) else container.extend)(then)


def _same(now: Any, then: Any) -> bool:
    pair = type(then) is tuple and type(now) is tuple and len(now) == len(then)  # of a dict
    return now is then or (pair and all(map(is_, now, then)))
