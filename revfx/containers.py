"""What lists, dicts, sets, deques, arrays, variables of closures and objects hold, noted and put back."""

from __future__ import annotations

import contextlib
import functools
import operator
import sys
import threading
from argparse import Namespace
from array import array
from collections import ChainMap, OrderedDict, UserDict, UserList, deque
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from types import BuiltinMethodType, CellType, FunctionType, MethodType, MethodWrapperType, ModuleType, SimpleNamespace
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn


_T = TypeVar("_T")
DEPTH = 8  # how far containers and objects are followed
MANY = 256  # entries of a container that is not looked through for functions and the like
LARGE = 2**20  # bytes of an array that nobody compares at every call
CONTAINERS = (list, dict, set, deque)
PRIMITIVE = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device)
METHODS = (MethodType, BuiltinMethodType, MethodWrapperType)
HOLDERS = (Namespace, SimpleNamespace, UserDict, UserList, ChainMap, threading.local, WeakKeyDictionary)
Held = list[tuple[Any, list[Any]]]  # containers, each with what was in it


def is_container(value: object) -> bool:
    """Whether something else may be put into `value`: also numbers into an array, or values into an object's slots."""
    return issubclass(type(value), (*CONTAINERS, CellType, ContextVar)) or is_array(value) or bool(slots(type(value)))


def is_array(value: Any) -> bool:
    """Whether `value` is a bytearray or an array of Python's or NumPy's, of numbers; not a large one, which is data."""
    numpy = sys.modules.get("numpy")
    if numpy is not None and issubclass(type(value), numpy.ndarray):
        found: Any = value
        return not found.dtype.hasobject and found.nbytes <= LARGE
    return issubclass(type(value), (bytearray, array)) and len(value) <= LARGE


def by_class(ask: Callable[[type], _T]) -> Callable[[type], _T]:
    """`ask`, with what it answered of most classes kept."""
    cached = functools.lru_cache(maxsize=4096)(ask)

    @functools.wraps(ask)
    def asked(kind: type) -> _T:
        try:
            return cached(kind)
        except TypeError:  # a class of one that has no hash
            return ask(kind)

    return asked


@by_class
def slots(kind: type) -> tuple[str, ...]:
    """The names of the slots of a class; none of torch's and Python's own."""
    return () if is_librarys(kind) or issubclass(kind, (*CONTAINERS, tuple, Tensor, nn.Module)) else slot_names(kind)


def slot_names(kind: type) -> tuple[str, ...]:
    """The names of the slots of any class, as they are looked up from outside."""
    named = [(c.__name__.lstrip("_"), vars(c).get("__slots__", ())) for c in kind.__mro__]
    found = [(c, n) for c, names in named for n in ((names,) if isinstance(names, str) else names)]
    private = [f"_{c}{n}" if n.startswith("__") and not n.endswith("__") else n for c, n in found]
    return tuple(n for n in private if n not in ("__dict__", "__weakref__"))


@by_class
def is_librarys(kind: type) -> bool:
    """Whether a class is torch's or one of Python's own, which are not looked into; but for those that hold what others
    put there.
    """
    library = str(kind.__module__).partition(".")[0]
    return library in ("torch", "revfx") or (library in sys.stdlib_module_names and not issubclass(kind, HOLDERS))


def is_plain(value: object) -> bool:
    """Whether `value` is an object whose state is its attributes, such as a configuration; not one of torch's or
    Python's own.
    """
    if is_librarys(type(value)) or issubclass(type(value), (type, nn.Module, ModuleType, FunctionType, MethodType)):
        return False
    try:
        return type(value.__dict__) is dict
    except Exception:  # of the user's: also what raises when it is asked
        return False


def parts_of(value: Any) -> Iterable[Any]:
    """What is in a tuple or a frozen set, and what a function knows or is called with: that can't be replaced."""
    if issubclass(type(value), (tuple, frozenset)):
        return value
    if issubclass(type(value), METHODS) and not isinstance(value.__self__, (ModuleType, type)):
        return (value.__self__,)
    if issubclass(type(value), functools.partial):
        return value.func, *value.args, value.keywords, *value.keywords.values()
    if issubclass(type(value), FunctionType):
        return *(value.__closure__ or ()), vars(value)
    return ()


def content(container: Any) -> list[Any]:
    """What a list or a set holds, or a dict as pairs; a cell holds one thing, or none."""
    if type(container) is dict:
        return list(container.items())
    if isinstance(container, (CellType, ContextVar)):
        with contextlib.suppress(ValueError, LookupError):
            return [container.cell_contents if isinstance(container, CellType) else container.get()]
        return []
    if is_array(container):
        return [container.tobytes() if hasattr(container, "tobytes") else bytes(container)]
    if slots(type(container)):
        return [(n, getattr(container, n)) for n in slots(type(container)) if hasattr(container, n)]
    kind = kind_of(container)
    inside = list(kind.__iter__(container))
    return [(k, dict.__getitem__(container, k)) for k in inside] if issubclass(kind, dict) else inside


def inside(value: Any) -> list[Any]:
    """What a value holds and knows, entries of dicts as keys and values; nothing of arrays and of large containers."""
    if _holds_nothing(type(value)) or is_array(value):
        return []
    own = (*(vars(value).items() if is_plain(value) else ()), *(content(value) if is_container(value) else ()))
    return [*(_flat([*own]) if len(own) <= MANY else ()), *parts_of(value)]


@by_class
def _holds_nothing(kind: type) -> bool:
    return kind in (*PRIMITIVE, Tensor, nn.Parameter) or issubclass(kind, (type, ModuleType, nn.Module))


def held_within(values: Iterable[Any]) -> Held:
    """The containers among `values` and in each other, and the attributes of plain objects."""
    found: dict[int, tuple[Any, list[Any]]] = {}
    level = list(values)
    for _ in range(DEPTH):
        inner: list[Any] = []
        for value in level:
            inner.extend(parts_of(value))
            for table in (value, vars(value)) if is_plain(value) else (value,):
                if is_container(table) and id(table) not in found:
                    found[id(table)] = table, content(table)
                    inner.extend(_flat(found[id(table)][1]))
        level = inner
    return list(found.values())


@dataclass(frozen=True, slots=True)
class _Graphed:
    """In place of a tensor with a graph, which may lead to what notes it: it, while others hold it, and its numbers."""

    of: ref[Tensor]
    numbers: Tensor


@dataclass(frozen=True, slots=True)
class _Parts:
    """In place of a tuple of a `kind` in which there are such tensors."""

    kind: type
    parts: tuple[Any, ...]


def kept(value: Any) -> Any:
    """`value`, or what stands for it in a note that must not keep graphs alive."""
    if issubclass(type(value), Tensor):
        return value if value.is_leaf else _Graphed(ref(value), value.detach().requires_grad_())
    if issubclass(type(value), tuple):
        parts = tuple(map(kept, value))
        return value if all(map(operator.is_, parts, value)) else _Parts(type(value), parts)
    return value


def given_back(value: Any) -> Any:
    """What `kept` was given, in other tuples; of tensors that nobody holds any more the numbers."""
    if type(value) is _Graphed:
        tensor = value.of()
        return value.numbers if tensor is None else tensor
    return tuple.__new__(value.kind, map(given_back, value.parts)) if type(value) is _Parts else value


def same(now: Any, then: Any) -> bool:
    """Whether `now` is what was `kept` then."""
    if type(then) is _Graphed:
        return now is then.of()
    if type(then) is _Parts:
        return type(now) is then.kind and len(now) == len(then.parts) and all(map(same, now, then.parts))
    return now is then or (type(now) is bytes and now == then)


def noted(container: Any) -> tuple[Any, list[Any]]:
    """A container, and what it holds, as it may be kept."""
    return container, _kept(content(container))


def _kept(items: list[Any]) -> list[Any]:
    return [tuple(map(kept, x)) if type(x) is tuple else kept(x) for x in items]


def adopt(container: Any, then: list[Any]) -> None:
    """None; what was added to a dict or list since `then` is taken for what was there."""
    now = content(container)
    if issubclass(type(container), dict):
        known = {id(k) for k, _ in then}
        then.extend(_kept([pair for pair in now if id(pair[0]) not in known]))
    elif issubclass(type(container), list) and not differ([(now[: len(then)], then)]):
        then.extend(_kept(now[len(then) :]))


def differ(containers: Held, equal: Callable[[Any, Any], bool] = lambda a, b: False) -> bool:
    """Whether one of the containers holds something else than it held: another object, and not one that is `equal`."""
    for container, then in containers:
        now, before = _flat(content(container)), _flat(then)
        if len(now) != len(before) or not all(same(a, b) or equal(a, b) for a, b in zip(now, before, strict=True)):
            return True
    return False


def put_back(containers: Held) -> None:
    """None; each container holds again what it held."""
    for container, then in containers:
        if not differ([(container, then)]):
            continue
        then = [tuple(map(given_back, x)) if type(x) is tuple else given_back(x) for x in then]
        if is_array(container):
            _write(container, then[0])
        elif slots(type(container)):
            _set(container, dict(then))
        elif isinstance(container, CellType):
            _fill(container, then)
        elif isinstance(container, ContextVar):
            container.set(*then) if then else None
        else:
            kind = kind_of(container)
            if not issubclass(kind, dict) or [*map(id, kind.__iter__(container))] != [id(k) for k, _ in then]:
                kind.clear(container)
            if issubclass(kind, dict):
                for k, v in then:
                    kind.__setitem__(container, k, v)
            else:
                (set.update if kind is set else kind.extend)(container, then)


def _write(numbers: Any, then: bytes) -> None:
    if isinstance(numbers, (bytearray, array)):  # a slice of the same length stays in place, also where views are on it
        values: Any = then if isinstance(numbers, bytearray) else array(numbers.typecode, then)
        numbers[:] = values
    elif numbers.flags.writeable:
        numbers[...] = sys.modules["numpy"].frombuffer(then, numbers.dtype).reshape(numbers.shape)


def _set(item: Any, then: dict[str, Any]) -> None:
    for name in slots(type(item)):
        if name in then:
            object.__setattr__(item, name, then[name])  # also where the class forbids it
        elif hasattr(item, name):
            object.__delattr__(item, name)


def _fill(cell: CellType, then: list[Any]) -> None:
    if then:
        cell.cell_contents = then[0]
    else:
        del cell.cell_contents


def kind_of(container: Any) -> Any:
    """The built-in class of a container: a subclass may make something else of a look-up (a new object each time)."""
    return next(kind for kind in (OrderedDict, *CONTAINERS) if isinstance(container, kind))


def _flat(items: list[Any]) -> list[Any]:
    """The items, those of dicts as keys and values."""
    return [x for item in items for x in (item if type(item) is tuple else (item,))]
