"""Declared inverses: calls of functions, methods and modules that a library or the user says how to invert.

While a forward is learnt, Python reports each call and return (`sys.setprofile`), so that nothing of the user's is
replaced. Three kinds of calls declare an inverse:

- a function with a parameter `inverse`, which is true or false: the same call with the other value, as for the splines
  of nflows and normflows;
- a method of a `torch.distributions` transform: its opposite;
- the forward of a module of a class that is registered by `revfx.register_inverse`: the rule, or the method.

The operators inside stay on the tape as they are. The declared inverse is one more way to obtain the first tensor of
the arguments from the first tensor of the result; where it is wrong, the code that corrects it is large, and the tensor
is kept.
"""

from __future__ import annotations

import copy
import inspect
import sys
import types
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.distributions import Transform
from torch.utils import _pytree as pytree

from revfx.engine import dispatch
from revfx.engine.learn import Learning
from revfx.engine.tape import Declared
from revfx.engine.whole import undisturbed
from revfx.rules import Inverse, rule_for_class


OPPOSITE = {"_call": "_inverse", "_inverse": "_call", "call_and_ladj": "_inverse"}  # the last one is zuko's
CACHES: dict[str, Any] = {"_inv": None, "_cached_x_y": (None, None)}  # attributes of transforms
FLAG = "inverse"


@dataclass(frozen=True)
class Call:
    """A call that is running: its kind ("function", "transform" or "module"), the called object, and the arguments."""

    kind: str
    called: Any
    arguments: dict[str, Any]
    method: str = ""


@dataclass(frozen=True)
class Operand:
    """The place of a tensor among arguments."""

    index: int


class CallObserver:
    """Note on the tape the inverses that calls declare while this is entered; none under a profiler in C."""

    def __init__(self, learning: Learning) -> None:
        self._learning = learning
        self._running: dict[int, Call] = {}  # by the id of a frame
        self._functions: dict[int, tuple[types.CodeType, Any]] = {}  # by the id of their code, which need not hash
        self._before: Any = None
        self._is_on = False

    def __enter__(self) -> None:
        self._before = sys.getprofile()
        self._is_on = self._before is None or callable(self._before)  # a profiler in C can't be put back
        if self._is_on:
            sys.setprofile(self._profile)

    def __exit__(self, *_: object) -> None:
        if self._is_on:
            sys.setprofile(self._before)

    def _profile(self, frame: Any, event: str, result: Any) -> None:
        if event == "call":
            call = self._call_of(frame)
            if call is not None:
                self._running[id(frame)] = call
        elif event == "return":
            call = self._running.pop(id(frame), None)
            if call is not None and result is not None:
                sys.setprofile(None)
                try:
                    self._declare(call, result)
                finally:
                    sys.setprofile(self._profile)

    # --- calls
    def _call_of(self, frame: Any) -> Call | None:
        code = frame.f_code
        name = code.co_name
        if name in OPPOSITE:
            transform = frame.f_locals.get("self")
            is_one = isinstance(transform, Transform)
            return Call("transform", transform, _arguments(frame), name) if is_one else None
        if name == "forward":
            module = frame.f_locals.get("self")
            is_registered = isinstance(module, nn.Module) and rule_for_class(type(module)) is not None
            return Call("module", module, _arguments(frame)) if is_registered else None
        if any(call.kind == "function" for call in self._running.values()):
            return None  # the outermost one counts
        function = self._function_of(frame)
        if function is None or not isinstance(frame.f_locals.get(FLAG), bool):
            return None
        return Call("function", function, _arguments(frame))

    def _function_of(self, frame: Any) -> Any:
        code = frame.f_code
        if id(code) not in self._functions:
            function = frame.f_globals.get(code.co_name)
            is_its_own = isinstance(function, types.FunctionType) and function.__code__ is code
            has_flag = FLAG in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
            known = function if is_its_own and has_flag and not code.co_freevars else None
            self._functions[id(code)] = code, known
        return self._functions[id(code)][1]

    # --- declarations
    def _declare(self, call: Call, result: Any) -> None:
        y = next((t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)), None)
        given = [v for k, v in call.arguments.items() if k != "self"]
        x = next((t for t in pytree.tree_leaves(given) if isinstance(t, Tensor)), None)
        if x is None or y is None or x is y or x.shape != y.shape or x.dtype != y.dtype:
            return
        if not (x.is_floating_point() and self._learning.is_known(x) and self._learning.is_known(y)):
            return
        if call.kind == "module":
            self._declare_rule(call, x, y)
            return
        by, operands = _transform_inverse(call) if call.kind == "transform" else _flipped(call, x)
        name = type(call.called).__name__ if call.kind == "transform" else call.called.__name__
        if all(self._learning.is_known(t) or isinstance(t, nn.Parameter) for t in operands):
            self._note(x, y, operands, by, name)

    def _declare_rule(self, call: Call, x: Tensor, y: Tensor) -> None:
        """Note the inverses that the rule of a module's class yields for a node that stands for the call."""
        rule = rule_for_class(type(call.called))
        assert rule is not None
        graph = fx.Graph()
        tensors: list[Tensor] = []

        def stand_in(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            node = graph.placeholder(f"x{len(tensors)}")
            node.meta["val"] = leaf
            tensors.append(leaf)
            return node

        args = [pytree.tree_map(stand_in, v) for k, v in call.arguments.items() if k != "self"]
        node = graph.create_node("call_module", type(call.called).__name__, tuple(args))
        node.meta.update(val=y, module=lambda module=call.called: module)
        placeholders = graph.find_nodes(op="placeholder")
        for direction in rule(node):
            if not isinstance(direction, Inverse) or direction.solves is not placeholders[0]:
                continue
            nodes = [n for n in direction.given if isinstance(n, fx.Node)]
            operands = [tensors[placeholders.index(n)] for n in nodes]
            by = _with_numbers(direction.by, direction.given)
            if direction.runs:
                by = _undisturbed(call.called, by)
            self._note(x, y, operands, by, type(call.called).__name__)

    def _note(self, x: Tensor, y: Tensor, operands: Sequence[Tensor], by: Callable[..., Any], name: str) -> None:
        if _works(by, x, y, operands):
            number = self._learning.number
            given = tuple(number(t) for t in operands)
            self._learning.tape.declared.append(Declared(number(x), number(y), given, by, name))


def _arguments(frame: Any) -> dict[str, Any]:
    """Return the arguments of a call that just began, by name, with those of `*args` and `**kwargs` under theirs."""
    code, found = frame.f_code, dict[str, Any]()
    count = code.co_argcount + code.co_kwonlyargcount
    names = code.co_varnames[: count + bool(code.co_flags & inspect.CO_VARARGS)]
    for name in names:
        if name in frame.f_locals:
            found[name] = frame.f_locals[name]
    return found


def _flipped(call: Call, x: Tensor) -> tuple[Callable[..., Any], list[Tensor]]:
    """Return the inverse of a call of a function, as a function of its result and of other tensors."""
    operands: list[Tensor] = []

    def stand_in(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if leaf is x:
            return Operand(0)
        operands.append(leaf)
        return Operand(len(operands))

    arguments = pytree.tree_map(stand_in, call.arguments)
    arguments[FLAG] = not call.arguments[FLAG]

    def by(*tensors: Tensor) -> Any:
        given = pytree.tree_map_only(Operand, lambda o: tensors[o.index], arguments)
        bound = inspect.signature(call.called).bind_partial()
        bound.arguments.update({k: given[k] for k in inspect.signature(call.called).parameters if k in given})
        return pytree.tree_leaves(call.called(*bound.args, **bound.kwargs))[0]

    return by, operands


def _transform_inverse(call: Call) -> tuple[Callable[..., Any], list[Tensor]]:
    """Return the inverse of a transform, as a function of its result and of the tensors that the transform holds."""
    operands: list[Tensor] = []

    def stand_in(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        operands.append(leaf)
        return Operand(len(operands))

    opposite, empty = OPPOSITE[call.method], _mapped(call.called, stand_in)

    def by(*tensors: Tensor) -> Any:
        found = _mapped(empty, lambda leaf: tensors[leaf.index] if isinstance(leaf, Operand) else leaf)
        return getattr(found, opposite)(tensors[0])

    return by, operands


def _mapped(x: Any, leaf: Callable[[Any], Any]) -> Any:
    """Return a copy of a transform, or of something that it holds, with leaves replaced."""
    if isinstance(x, Transform):
        twin = copy.copy(x)
        for k, v in vars(x).items():
            vars(twin)[k] = CACHES[k] if k in CACHES else _mapped(v, leaf)
        return twin
    if type(x) in (list, tuple):
        return type(x)(_mapped(v, leaf) for v in x)
    return {k: _mapped(v, leaf) for k, v in x.items()} if type(x) is dict else leaf(x)


def _with_numbers(by: Callable[..., Any], given: tuple[Any, ...]) -> Callable[..., Any]:
    """Return `by` as a function of the result and of those of `given` that are tensors."""

    def of_tensors(result: Tensor, *tensors: Tensor) -> Any:
        rest = iter(tensors)
        return by(result, *(next(rest) if isinstance(g, fx.Node) else g for g in given))

    return of_tensors


def _undisturbed(module: nn.Module, by: Callable[..., Any]) -> Callable[..., Any]:
    """Return `by`, which runs a module, without effect on random states and on the buffers of the module."""

    def run(*tensors: Tensor) -> Any:
        with undisturbed(module):
            return by(*tensors)

    return run


@contextmanager
def _no_module_calls() -> Any:
    def refuse(module: nn.Module, args: Any) -> None:
        raise _CallsModule

    hook = nn.modules.module.register_module_forward_pre_hook(refuse)
    try:
        yield
    finally:
        hook.remove()


class _CallsModule(Exception):
    """An inverse runs a module once more."""


def _works(by: Callable[..., Any], x: Tensor, y: Tensor, operands: Sequence[Tensor]) -> bool:
    """Return whether a declared inverse may be used: it runs no network, and gives a tensor of the right shape.

    One that raises may do so for these numbers alone.
    """
    with torch.no_grad(), dispatch.unseen(), torch.random.fork_rng():
        try:
            with _no_module_calls():
                found = by(y.detach(), *(t.detach() for t in operands))
        except _CallsModule:
            return False
        except Exception:
            return True
    return isinstance(found, Tensor) and found.shape == x.shape
