"""Declared inverses: calls of functions, methods and modules that a library or the user says how to invert.

While a forward is recorded, Python reports each call and return (`sys.setprofile`), so that no user code is replaced.
Three kinds of calls declare an inverse:

- a function with a parameter `inverse`, which is true or false: the same call with the other value, as for the splines
  of nflows and normflows;
- a method of a `torch.distributions` transform: its opposite;
- the forward of a module of a class that is registered by `revfx.register_inverse`: the rule, or the method.

The operators inside stay on the tape as they are. The declared inverse is one more way to obtain the first tensor of
the arguments from the first tensor of the result. If it is wrong, the code that corrects it is large, and the tensor is
kept.
"""

from __future__ import annotations

import copy
import inspect
import sys
import types
from collections.abc import Callable, Sequence
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

    @property
    def operands(self) -> list[Any]:
        """The arguments besides `self`."""
        return [v for name, v in self.arguments.items() if name != "self"]


@dataclass(frozen=True)
class Operand:
    """The index of a tensor that an inverse takes, in the place of the tensor."""

    index: int


class CallObserver:
    """Records the inverses that calls declare while it is entered; none under a profiler in C."""

    def __init__(self, learning: Learning) -> None:
        self._learning = learning
        self._running: dict[int, Call] = {}  # by the id of a frame
        self._functions: dict[int, tuple[types.CodeType, Any]] = {}  # by the id of the code, which may lack a hash
        self._before: Any = None
        self._is_on = False

    def __enter__(self) -> None:
        self._before = sys.getprofile()
        self._is_on = self._before is None or callable(self._before)  # a profiler in C can't be restored
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
        """Return the call that a frame begins, if it declares an inverse."""
        name = frame.f_code.co_name
        if name in OPPOSITE:
            transform = frame.f_locals.get("self")
            if isinstance(transform, Transform):
                return Call("transform", transform, _arguments_of(frame), name)
            return None
        if name == "forward":
            module = frame.f_locals.get("self")
            if isinstance(module, nn.Module) and rule_for_class(type(module)) is not None:
                return Call("module", module, _arguments_of(frame))
            return None
        if any(call.kind == "function" for call in self._running.values()):
            return None  # the outermost one counts
        function = self._function_of(frame)
        if function is None or not isinstance(frame.f_locals.get(FLAG), bool):
            return None
        return Call("function", function, _arguments_of(frame))

    def _function_of(self, frame: Any) -> Any:
        """Return the global function of a frame, if it has the parameter `inverse`."""
        code = frame.f_code
        if id(code) not in self._functions:
            function = frame.f_globals.get(code.co_name)
            is_global = isinstance(function, types.FunctionType) and function.__code__ is code
            has_flag = FLAG in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
            if not is_global or not has_flag or code.co_freevars:
                function = None
            self._functions[id(code)] = code, function
        return self._functions[id(code)][1]

    # --- declarations
    def _declare(self, call: Call, result: Any) -> None:
        """Record the inverse of a call that has ended."""
        x, y = _first_tensor(call.operands), _first_tensor(result)
        if x is None or y is None or x is y or x.shape != y.shape or x.dtype != y.dtype:
            return
        if not (x.is_floating_point() and self._learning.is_known(x) and self._learning.is_known(y)):
            return
        if call.kind == "module":
            self._declare_rule(call, x, y)
            return
        if call.kind == "transform":
            (by, operands), name = _transform_inverse(call), type(call.called).__name__
        else:
            (by, operands), name = _function_inverse(call, x), call.called.__name__
        if all(self._learning.is_known(t) or isinstance(t, nn.Parameter) for t in operands):
            self._record(x, y, operands, by, name)

    def _declare_rule(self, call: Call, x: Tensor, y: Tensor) -> None:
        """Record the inverses that the rule of a module's class yields for a node that stands for the call."""
        rule = rule_for_class(type(call.called))
        assert rule is not None
        graph = fx.Graph()
        tensors: list[Tensor] = []

        def add_placeholder(t: Tensor) -> fx.Node:
            node = graph.placeholder(f"x{len(tensors)}")
            node.meta["val"] = t
            tensors.append(t)
            return node

        args = [pytree.tree_map_only(Tensor, add_placeholder, v) for v in call.operands]
        node = graph.create_node("call_module", type(call.called).__name__, tuple(args))
        node.meta.update(val=y, module=lambda module=call.called: module)
        placeholders = graph.find_nodes(op="placeholder")
        for direction in rule(node):
            if not isinstance(direction, Inverse) or direction.solves is not placeholders[0]:
                continue
            nodes = [n for n in direction.given if isinstance(n, fx.Node)]
            operands = [tensors[placeholders.index(n)] for n in nodes]
            by = _bind_numbers(direction.by, direction.given)
            if direction.runs:
                by = undisturbed(call.called)(by)  # a decorator
            self._record(x, y, operands, by, type(call.called).__name__)

    def _record(self, x: Tensor, y: Tensor, operands: Sequence[Tensor], by: Callable[..., Any], name: str) -> None:
        if _works(by, x, y, operands):
            number = self._learning.number
            given = tuple(map(number, operands))
            self._learning.tape.declared.append(Declared(number(x), number(y), given, by, name))


def _arguments_of(frame: Any) -> dict[str, Any]:
    """Return the arguments of a call that just began by name, `*args` as a tuple; those of `**kwargs` are left out."""
    code = frame.f_code
    count = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & inspect.CO_VARARGS)
    return {name: frame.f_locals[name] for name in code.co_varnames[:count] if name in frame.f_locals}


def _first_tensor(tree: Any) -> Tensor | None:
    return next((t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor)), None)


def _function_inverse(call: Call, x: Tensor) -> tuple[Callable[..., Any], list[Tensor]]:
    """Return the inverse of a call of a function, as a function of its result and of other tensors."""
    operands: list[Tensor] = []

    def place(t: Tensor) -> Operand:
        return Operand(0) if t is x else _append(operands, t)

    arguments = pytree.tree_map_only(Tensor, place, call.arguments)
    arguments[FLAG] = not call.arguments[FLAG]

    def by(*tensors: Tensor) -> Any:
        given = pytree.tree_map_only(Operand, lambda o: tensors[o.index], arguments)
        signature = inspect.signature(call.called)
        bound = signature.bind_partial()
        for name in signature.parameters:  # in their order
            if name in given:
                bound.arguments[name] = given[name]
        return pytree.tree_leaves(call.called(*bound.args, **bound.kwargs))[0]

    return by, operands


def _transform_inverse(call: Call) -> tuple[Callable[..., Any], list[Tensor]]:
    """Return the inverse of a transform, as a function of its result and of the tensors that the transform holds."""
    operands: list[Tensor] = []

    def place(leaf: Any) -> Any:
        return _append(operands, leaf) if isinstance(leaf, Tensor) else leaf

    opposite, template = OPPOSITE[call.method], _map_leaves(call.called, place)

    def by(*tensors: Tensor) -> Any:
        transform = _map_leaves(template, lambda leaf: tensors[leaf.index] if isinstance(leaf, Operand) else leaf)
        return getattr(transform, opposite)(tensors[0])

    return by, operands


def _append(operands: list[Tensor], t: Tensor) -> Operand:
    """Append a tensor to the operands, which follow the result of the call; return its place."""
    operands.append(t)
    return Operand(len(operands))


def _map_leaves(x: Any, function: Callable[[Any], Any]) -> Any:
    """Return a copy of a transform, or of something that it holds, with a function applied to leaves."""
    if isinstance(x, Transform):
        twin = copy.copy(x)
        for name, v in vars(x).items():
            vars(twin)[name] = CACHES[name] if name in CACHES else _map_leaves(v, function)
        return twin
    if type(x) in (list, tuple):
        return type(x)(_map_leaves(v, function) for v in x)
    if type(x) is dict:
        return {name: _map_leaves(v, function) for name, v in x.items()}
    return function(x)


def _bind_numbers(by: Callable[..., Any], given: tuple[Any, ...]) -> Callable[..., Any]:
    """Return `by` as a function of the result and of those of `given` that are tensors."""

    def by_tensors(result: Tensor, *tensors: Tensor) -> Any:
        rest = iter(tensors)
        return by(result, *(next(rest) if isinstance(g, fx.Node) else g for g in given))

    return by_tensors


class _ModuleCall(Exception):
    """An inverse runs a module."""


def _refuse_module(module: nn.Module, args: Any) -> None:
    raise _ModuleCall


def _works(by: Callable[..., Any], x: Tensor, y: Tensor, operands: Sequence[Tensor]) -> bool:
    """Return whether a declared inverse may be used: it runs no network, and returns a tensor of the right shape.

    One that raises is used, as it may raise for these numbers alone.
    """
    with torch.no_grad(), dispatch.unseen(), torch.random.fork_rng():
        try:
            with nn.modules.module.register_module_forward_pre_hook(_refuse_module):
                found = by(y.detach(), *(t.detach() for t in operands))
        except _ModuleCall:
            return False
        except Exception:
            return True
    return isinstance(found, Tensor) and found.shape == x.shape
