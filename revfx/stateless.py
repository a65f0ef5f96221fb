"""Whether code can run a second time and leave everything as it was, as far as that follows from its byte code.

It may call what it finds on tensors and in torch, its module's own parts and methods, and functions of the user's that
are such code as well; what it sets are local variables only. All else, and what can't be told, is taken to leave
something behind: attributes and entries that are set, methods of lists and dicts, tensors written in place.
"""

from __future__ import annotations

import builtins
import dis
import inspect
import math
import types
from collections.abc import Collection, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revfx import _torch


WRITES = ("STORE_ATTR", "STORE_GLOBAL", "STORE_NAME", "STORE_SUBSCR", "STORE_SLICE", "DELETE_", "IMPORT_", "INPLACE_")
BUILTINS = frozenset(
    (abs, bool, dict, enumerate, float, int, isinstance, len, list, max, min, pow, range, round, sum, super, tuple, zip)
)
PLAIN = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device)
CODE = (type, types.FunctionType, types.BuiltinFunctionType)
LIBRARIES = ("torch", "math")
# Functions of torch that write to arguments without a name that says so, draw from generators, or set something.
SETS = frozenset(
    """batch_norm instance_norm embedding embedding_bag register_hook backward seed manual_seed numpy item tolist
    use_deterministic_algorithms load save compile share_memory""".split()
)
GIVEN = frozenset(("out", "inplace", "generator"))  # arguments by which a function writes or draws


@_torch.constant_when_compiled
def leaves_nothing(kind: type[nn.Module], own: tuple[str, ...], others: tuple[str, ...] = ()) -> bool:
    """Whether the forward of a module class is such code; `own` are the names of the module's parts, tensors and
    numbers, `others` those of what else it has.
    """
    hooks = ("__call__", "__getattr__", "__getattribute__", "_call_impl")
    if any(getattr(kind, name) is not getattr(nn.Module, name) for name in hooks):
        return False
    todo, seen = [kind.forward], set[int]()
    while todo:
        function: Any = todo.pop()
        if id(function) in seen:
            continue
        seen.add(id(function))
        if not isinstance(function, types.FunctionType) or set(function.__code__.co_freevars) - {"__class__"}:
            return False
        defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
        if not all(isinstance(d, PLAIN) for d in defaults):
            return False
        for code in _codes(function.__code__):
            found = _named(code, function, kind, own, others)
            if found is None:
                return False
            todo += found
    return True


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _named(
    code: types.CodeType, function: types.FunctionType, kind: type, own: Collection[str], others: Collection[str]
) -> list[Any] | None:
    """The user's functions that some code calls; None where it may leave something behind."""
    texts = {t for c in code.co_consts for t in (c if isinstance(c, tuple) else (c,)) if isinstance(t, str)}
    if GIVEN & texts:
        return None
    found = list[Any]()
    for instruction in dis.get_instructions(code):
        op, name = instruction.opname, instruction.argval
        if op.startswith(WRITES) or (op == "BINARY_OP" and instruction.argrepr.endswith("=")):
            return None
        if op == "STORE_DEREF" and name in code.co_freevars:
            return None
        if op in ("LOAD_GLOBAL", "LOAD_NAME"):
            called = _called(function.__globals__.get(name, getattr(builtins, name, None)))
        elif op in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR") and name not in own:
            value = inspect.getattr_static(kind, name, None)
            theirs = value is None or value is inspect.getattr_static(nn.Module, name, None)
            called = None if name in others else _called(value) if not theirs else [] if _is_torchs(name) else None
        else:
            continue
        if called is None:
            return None
        found += called
    return found


def _called(value: Any) -> list[Any] | None:
    """The user's functions behind what a name stands for; None where it is none that may be asked for."""
    if isinstance(value, (staticmethod, classmethod)):
        return [value.__func__]
    if isinstance(value, property):
        return [value.fget]
    if isinstance(value, PLAIN) or isinstance(value, types.ModuleType):
        return [] if isinstance(value, PLAIN) or _library(value) in LIBRARIES else None
    if isinstance(value, CODE) and _library(value) in LIBRARIES:
        return None if _writes(value.__name__) else []
    if isinstance(value, types.FunctionType):
        return [value]
    return [] if isinstance(value, CODE) and value in BUILTINS else None


def _library(code: Any) -> str:
    """The package that a module, class or function is from."""
    owner = (
        code.__self__ if isinstance(code, types.BuiltinFunctionType) and not getattr(code, "__module__", "") else code
    )
    name = code.__name__ if isinstance(code, types.ModuleType) else getattr(owner, "__module__", None)
    return (name or "").partition(".")[0]


def _is_torchs(name: str) -> bool:
    """Whether an attribute is one of tensors or of torch, and none that writes."""
    places = (Tensor, torch, F, nn, math, torch.fft, torch.linalg, torch.special)
    return not _writes(name) and any(hasattr(place, name) for place in places)


def _writes(name: str) -> bool:
    return name in SETS or name.startswith("set_") or (name.endswith("_") and not name.endswith("__"))
