"""What a call may read besides its arguments, found by walking: what hangs on the function, and what its code names.

Tables of attributes, globals and containers are noted with what they held; tensors with their version and address.
Breadth first, and long containers last: an object may lead to a data set, and there is room for so much only.
"""

from __future__ import annotations

import functools
import sys
import types
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from revfx import _torch
from revfx.containers import (
    CONTAINERS,
    Held as Contents,
    adopt,
    content,
    differ,
    given_back,
    is_array,
    is_container,
    is_librarys,
    is_plain,
    kept,
    noted,
    put_back,
    same,
)
from revfx.fingerprint import SKIPPED, is_users
from revfx.mentions import (
    CACHED,
    classes,
    functions,
    is_followed,
    is_installed,
    is_users_name,
    mentions,
    misses,
    unasked,
)
from revfx.trees import data_address


MOST = 1_000  # entries of containers that are noted, and KiB of arrays; longer ones are not
COPIED = 2**24  # bytes of tensors in containers that are copied, as the call may write to them
LONG = 64  # entries of a container that waits until all else was looked at
CODES = 500  # functions whose code is looked at
PLAIN = (bool, int, float, str, type(None))
FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial)
IMMUTABLE = (int, float, complex, str, bytes, type(None), types.BuiltinFunctionType)
METHODS = (property, staticmethod, classmethod, functools.cached_property, functools.partialmethod, CACHED)
ABSENT = object()
ELSEWHERE = object()  # in place of a tensor, which is noted by itself: its graph may lead to the state that holds this
SHARDED = -1  # in place of the size of a table that FSDP2 changes by design
Names = dict[str, Any]


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


@dataclass(slots=True)
class Reads:
    """What a call may read: tensors, what names stand for, and what containers hold.

    `names` are those of tables of globals; `owners` the classes, with all they have, and Python modules, with what is
    `mentioned` anywhere; `modules` are all that were met, each with its own attributes and how many entries its table
    has; `caches` are functions that keep results.
    """

    tensors: list[Held] = field(default_factory=list[Held])
    names: list[tuple[Names, Names]] = field(default_factory=list[tuple[Names, Names]])
    owners: list[tuple[Any, Names]] = field(default_factory=list[tuple[Any, Names]])
    mentioned: set[str] = field(default_factory=set[str])
    modules: list[tuple[nn.Module, Names, int]] = field(default_factory=list[tuple[nn.Module, Names, int]])
    contents: Contents = field(default_factory=list[tuple[Any, list[Any]]])
    caches: list[Any] = field(default_factory=list[Any])
    loaded: int = 0
    missed: int = 0

    def begin(self) -> None:
        """None; the call begins now."""
        self.loaded, self.missed = len(sys.modules), sum(map(misses, self.caches))

    def end(self) -> None:
        """None; the call has ended. If it imported something of the user's, or filled a cache, the names and entries
        that it added stay: that is not done a second time.
        """
        grown = len(sys.modules) > self.loaded
        imported = [*sys.modules][self.loaded :] if grown else []
        if not any(map(is_users_name, imported)) and sum(map(misses, self.caches)) == self.missed:
            return
        for table, then in self.names:
            then.update({k: kept(table[k]) for k, v in then.items() if v is ABSENT and k in table})
        for owner, then in self.owners:
            then.update({k: kept(vars(owner)[k]) for k in self._added(owner, then)})
        for container, then in self.contents:
            adopt(container, then)

    @property
    def cloned(self) -> bool:
        """Whether there is a tensor that the call may write."""
        return any(h.clone is not None for h in self.tensors)

    def all_contents(self) -> Contents:
        """`contents`, and tables of hooks and children that were empty and are not."""
        filled = [*_torch.hook_tables(), *(t for m, _, _ in self.modules for t in _torch.call_tables(m))]
        noted = {id(c) for c, _ in self.contents} if filled else set[int]()
        return [*self.contents, *((t, []) for t in filled if id(t) not in noted)]

    def differ(self) -> bool:
        """Whether something is not as it was; tensors are not looked at."""
        return (
            any(size not in (SHARDED, len(vars(m))) or _others(vars(m), then) for m, then, size in self.modules)
            or any(_others(now, then) for now, then in self.names)
            or any(self._added(owner, then) or _others(vars(owner), then) for owner, then in self.owners)
            or differ(self.all_contents())
        )

    def now(self, differs: bool) -> Reads:
        """The same places, as they are now; without tensors and modules."""
        if not differs:
            return Reads(names=self.names, owners=self.owners, mentioned=self.mentioned, contents=self.contents)
        names = [(table, {k: table.get(k, ABSENT) for k in then}) for table, then in self.names]
        owners = [(o, {k: vars(o).get(k, ABSENT) for k in self._all(o, then)}) for o, then in self.owners]
        contents = [(c, content(c)) for c, _ in self.all_contents()]
        return Reads(names=names, owners=owners, mentioned=self.mentioned, contents=contents)

    def _added(self, owner: Any, then: Names) -> list[str]:
        """The names that an owner has since then; not modules, as an import does not put them there a second time."""
        table = vars(owner)
        return [n for n in self.mentioned & table.keys() - then.keys() if type(table[n]) is not types.ModuleType]

    def _all(self, owner: Any, then: Names) -> list[str]:
        return [*then, *self._added(owner, then)]

    def put_back(self) -> None:
        """None; all is as it was; but for tensors, which are the caller's business."""
        for module, then, size in self.modules:
            table = vars(module)
            table.update({k: given_back(v) for k, v in then.items() if v is not ELSEWHERE})
            if size != SHARDED:
                for k in [k for k in table if k not in then and is_users(k)]:
                    del table[k]
        for table, then in self.names:
            for k, v in then.items():
                _assign(table, k, v)
        for owner, then in self.owners:
            for k in self._all(owner, then):
                _assign(owner, k, then.get(k, ABSENT))
        put_back(self.all_contents())


def _other(now: Any, then: Any) -> bool:
    return not same(now, then) and not (type(then) in PLAIN and type(now) in PLAIN and now == then)


def _others(now: Mapping[str, Any], then: Names) -> bool:
    changed = ((now.get(k, ABSENT), v) for k, v in then.items() if now.get(k, ABSENT) is not v)
    return any(_other(is_now, v) and not _stays(is_now, v) for is_now, v in changed)


def _stays(now: Any, then: Any) -> bool:
    return then is ELSEWHERE or (then is ABSENT and type(now) is types.ModuleType)


def _assign(owner: Any, name: str, value: Any) -> None:
    """None; a class, a module or a table of globals has `value` by that name, or nothing where it is absent."""
    table = owner if isinstance(owner, dict) else vars(owner)
    now = table.get(name, ABSENT)
    if same(now, value) or _stays(now, value):
        return
    value = given_back(value)
    if isinstance(owner, type):
        change, given = (type.__delattr__, ()) if value is ABSENT else (type.__setattr__, (value,))
        try:
            change(owner, name, *given)  # also where the class's own class forbids it
        except TypeError:  # that is one of C's, as ctypes has
            delattr(owner, name) if value is ABSENT else setattr(owner, name, value)
    elif value is ABSENT:
        del table[name]
    else:
        table[name] = value


def reads_of(function: Any) -> Reads:
    """What calling `function` may read: of modules, closures, globals, classes, defaults, containers, plain objects.

    A tuple of a function and its arguments is looked through like a closure.
    """
    walk = _Walk()
    walk.follow(function)
    return walk.found


@dataclass(slots=True)
class _Walk:
    """The state of one walk: `queue` is what was met (where it hangs, by which key, and what), `long` the containers
    that wait; `owners` are the classes and Python modules in which names are looked up, each with whether none was
    yet, and with what was found; `looked` are the names that were looked up.
    """

    found: Reads = field(default_factory=Reads)
    queue: list[tuple[Any, Any, Any]] = field(default_factory=list[tuple[Any, Any, Any]])
    long: list[Any] = field(default_factory=list[Any])
    seen: set[int] = field(default_factory=set[int])
    sharded: set[int] = field(default_factory=set[int])
    owners: dict[int, tuple[Any, bool, Names]] = field(default_factory=dict[int, tuple[Any, bool, Names]])
    looked: set[str] = field(default_factory=set[str])
    room: int = MOST
    copied: int = 0
    codes: int = CODES

    def follow(self, function: Any) -> None:
        """None; all that can be met from `function` is noted."""
        self.queue.append((None, "", function))
        self.found.contents.extend([(t, content(t)) for t in _torch.hook_tables()])
        at = 0
        while at < len(self.queue) or self._look_up() or self._open_long():
            for holder, key, item in self.queue[at:]:
                at += 1
                if not issubclass(type(item), IMMUTABLE) and id(item) not in self.seen:
                    self.seen.add(id(item))
                    self.queue.extend([(None, "", x) for x in self._visit(holder, key, item)])

    def _visit(self, holder: Any, key: Any, item: Any) -> list[Any]:
        """What can be met from `item`, after noting what it holds."""
        if issubclass(type(item), nn.Module):
            return self._module(item)
        if issubclass(type(item), Tensor):
            written = holder is not None and not isinstance(item, nn.Parameter) and not item.requires_grad
            if written and item.layout == torch.strided:
                self.copied += item.nbytes
            self.found.tensors.append(_hold(holder, key, item, clone=written and self.copied <= COPIED))
            return []
        try:
            return self._object(item)
        except Exception:  # of the user's: a dead `weakref.proxy`, an attribute that can't be asked for
            return []

    def _object(self, item: Any) -> list[Any]:
        """What can be met from what is no module and no tensor."""
        if isinstance(item, functools.partial):
            return [item.func, item.args, item.keywords]
        if isinstance(item, types.FunctionType):
            return self._function(item)
        if isinstance(item, types.MethodType):
            return [item.__func__, item.__self__]
        if isinstance(item, (tuple, frozenset)):
            return [*item]
        if isinstance(item, (type, types.ModuleType)):
            self._own(item)
            return []
        if isinstance(item, METHODS):
            self.found.caches.extend([item] if isinstance(item, CACHED) else [])
            return [*functions(item)]
        tables = [item] if is_container(item) else []
        if is_plain(item):
            self._own(type(item))
            tables.append(vars(item))
        for table in tables:
            self._open(table)
        if tables:
            return []
        own = getattr(item, "__dict__", {}).values()
        return [v for v in own if isinstance(v, (Tensor, nn.Module, list, tuple, dict))]

    def _open(self, container: Any) -> None:
        size = _size(container)
        if size > LONG and size <= self.room:
            self.long.append(container)
        elif size <= self.room:
            self._note(container)

    def _open_long(self) -> bool:
        """Whether there was a long container that there is room for."""
        while self.long:
            container = self.long.pop(0)
            if _size(container) <= self.room:
                self._note(container)
                return True
        return False

    def _note(self, container: Any) -> None:
        held = content(container)
        self.room -= max(len(held), _size(container))
        self.found.contents.append(noted(container))
        pairs: Any = held if isinstance(container, dict) else enumerate(held)
        where = container if isinstance(container, (dict, list)) else None
        self.queue.extend([(where, k, v) for k, v in pairs if type(v) not in PLAIN and not _is_theirs(v)])

    # --- what code names
    def _own(self, owner: Any) -> None:
        for o in (owner,) if isinstance(owner, types.ModuleType) else classes(owner):
            if id(o) not in self.owners and is_followed(o):
                whole = vars(o).copy() if isinstance(o, type) else {}
                then = {k: kept(v) for k, v in whole.items()}
                self.owners[id(o)] = o, True, then
                self.found.owners.append((o, then))

    def _look_up(self) -> bool:
        """Whether names stand for something in a class or Python module that was not met before."""
        before, mentioned = len(self.queue), self.found.mentioned
        named = mentioned - self.looked
        self.looked |= named
        for address, (owner, is_new, then) in [*self.owners.items()]:
            table = vars(owner)
            fresh = (mentioned if is_new else named) & table.keys()
            if isinstance(owner, type):
                self._meet(None, {n: table[n] for n in (fresh | unasked(owner) if is_new else fresh)})
            else:
                values = {n: table[n] for n in fresh}
                then.update({n: kept(v) for n, v in values.items()})
                self._meet(table, values)
            self.owners[address] = owner, False, then
        return len(self.queue) > before

    def _meet(self, table: Names | None, named: Names) -> None:
        """None; what code names in a `table` of globals, or in a class, is followed, but for what libraries made."""
        self.queue.extend([(None, "", v) for v in named.values() if type(v) not in PLAIN and _leads_on(v, table)])

    def _function(self, function: types.FunctionType) -> list[Any]:
        """What a function closes over, and its defaults; what its code names is noted, unless it is a library's."""
        cells = [c for c in function.__closure__ or () if not _is_empty(c)]
        if self.codes == 0 or not is_followed(function):
            return [c.cell_contents for c in cells]  # it may be wrapped around the user's
        self.codes -= 1
        self.found.contents.extend(map(noted, cells))
        known, named = function.__globals__, mentions(function.__code__)
        if named.globals:
            read = {n: known.get(n, ABSENT) for n in named.globals}
            self.found.names.append((known, {n: kept(v) for n, v in read.items()}))
            self._meet(known, read)
        self.found.mentioned |= named.attributes
        further = [c.cell_contents for c in cells]
        for n in (*named.imports, *named.attributes):
            if isinstance(module := sys.modules.get(n), types.ModuleType):
                self._own(module)
            elif module is not None:
                further.append(module)
        if function.__defaults__ or function.__kwdefaults__:
            further += [*(function.__defaults__ or ()), function.__kwdefaults__]
        return [*further, function.__dict__]

    # --- modules
    def _module(self, module: nn.Module) -> list[Any]:
        """What may be read through `module` besides what it holds itself, which is noted: children, and functions.

        Parameters that FSDP2 swaps by design, of sharded modules and those below them, are its own business.
        """
        found, table = self.found, vars(module)
        self._own(type(module))
        further: list[Any] = [m for m in _torch.children(module).values() if m is not None]
        if id(module) in self.sharded or _torch.is_fsdp(module):
            self.sharded.update(map(id, (module, *further)))
        own = id(module) not in self.sharded
        for key, p in _torch.parameters(module).items():
            if p is not None and own:
                found.tensors.append(_hold_parameter(module, key, p))
        buffers = _torch.buffers(module)
        for key, b in buffers.items():
            if b is not None:
                found.tensors.append(_hold(buffers if type(buffers) is dict else None, key, b, clone=True))
        names = {k: v for k, v in table.items() if k not in SKIPPED}
        for key, value in names.items():
            if type(value) in PLAIN:
                pass
            elif issubclass(type(value), Tensor):
                found.tensors.append(_hold(table, key, value, clone=True))
                names[key] = ELSEWHERE
            elif issubclass(type(value), FUNCTIONS) or (own and _may_change(value)):
                further.append(value)
        plain = {k: kept(v) for k, v in names.items() if own or type(v) in PLAIN}
        found.modules.append((module, plain, len(table) if own else SHARDED))
        found.contents.extend([(t, content(t)) for t in _torch.call_tables(module)])
        return [*further, getattr(type(module), "forward", None), *_torch.hooks(module)]


def _size(container: Any) -> int:
    """How many entries it counts for."""
    if is_array(container):
        return getattr(container, "nbytes", len(container)) >> 10
    return len(container) if isinstance(container, CONTAINERS) else 0


def _is_theirs(value: Any) -> bool:
    return type(value) is types.FunctionType and is_installed(value)


def _if_it_says(ask: Callable[..., bool]) -> Callable[..., bool]:
    """`ask`, but False of an object that raises when it is looked at."""

    @functools.wraps(ask)
    def asked(*of: Any) -> bool:
        try:
            return ask(*of)
        except Exception:
            return False

    return asked


@_if_it_says
def _may_change(value: Any) -> bool:
    """Whether what a module has as an attribute is looked through."""
    return isinstance(value, (tuple, type)) or is_container(value) or is_plain(value)


@_if_it_says
def _leads_on(value: Any, table: Names | None) -> bool:
    """Whether what is named in `table` is followed: installed packages are not looked through from module to module."""
    if isinstance(value, types.FunctionType):
        return table is None or value.__globals__ is table or not _is_theirs(value)
    if isinstance(value, (type, types.ModuleType)):
        return not is_installed(value)
    return isinstance(value, (Tensor, nn.Module, tuple, *FUNCTIONS, *METHODS)) or (
        is_container(value) or not is_librarys(type(value))
    )


# By module, and whether it trains, the names of its frozen parameters that a first call wrote to: codebooks that are
# averaged. They are too many to be cloned in every call.
frozen_written: weakref.WeakKeyDictionary[nn.Module, dict[bool, set[str]]] = weakref.WeakKeyDictionary()


def _hold_parameter(module: nn.Module, key: str, p: Tensor) -> Held:
    if is_lazy(p):
        raise ValueError(
            f"`{key}` of a {type(module).__name__} is not initialised yet: a lazy module can't be run again as it ran"
            " first. Call the model once under `torch.no_grad()` before it is trained."
        )
    table = _torch.parameters(module)
    known = frozen_written.get(module, {}).get(module.training)
    probing = known is None and not p.requires_grad
    # an embedding with a largest norm scales the rows that it reads
    written = getattr(module, "max_norm", None) is not None or (known is not None and key in known)
    made = _hold(table if type(table) is dict else None, key, p, clone=written or probing)  # not of scripted ones
    made.probed = module if probing else None
    return made


def _is_empty(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is cell
    except ValueError:
        return True
