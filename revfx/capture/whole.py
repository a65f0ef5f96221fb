"""Functions that can be told to invert themselves, such as a spline's, called whole where their code asks for numbers.

What libraries of flows have in common is a parameter `inverse`: `y, log_det = spline(x, *shape, inverse=False)`. The
inverse of such a call is the same call with the other value, given what else it was given. It is a prediction like any
other: where it is wrong, the code that makes up for it is large, and the value is kept.
"""

from __future__ import annotations

import copy
import functools
import inspect
import types
from collections.abc import Callable, Collection, Generator, Iterable
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from revfx import _torch
from revfx.ambient import all_generators, drew, restore
from revfx.capture.untraceable import ASKS, Untraceable
from revfx.eager.calls import tensors
from revfx.eager.modes import recording
from revfx.errors import Reason
from revfx.passes._torch import no_dispatch
from revfx.rules import by_call, op_name


if TYPE_CHECKING:
    from revfx.capture.recorder import Recorder


NAME = "inverse"


def told_to_invert() -> Callable[..., Any] | None:
    """Return the outermost of the functions that run that has a parameter `inverse`, which is true or false."""
    frame, found = _torch.caller(), None
    while frame is not None:
        code = frame.f_code
        function = frame.f_globals.get(code.co_name)
        mine = isinstance(function, types.FunctionType) and function.__code__ is code and not code.co_freevars
        if mine and NAME in inspect.signature(function).parameters and isinstance(frame.f_locals.get(NAME), bool):
            found = function
        frame = frame.f_back
    return found


@contextmanager
def called_whole(functions: Collection[Any]) -> Generator[None]:
    """Return a context in which this thread's recorder is told of calls of `functions`, whoever holds them."""
    _told.update((id(f), (f, _twin(f))) for f in functions)
    try:
        for function in functions:
            consts = tuple(id(function) if c == NAME else c for c in _tell.__code__.co_consts)
            function.__code__ = _tell.__code__.replace(co_consts=consts)
        yield
    finally:
        for function in functions:
            function.__code__ = _told.pop(id(function))[1].__code__


_told: dict[int, tuple[Any, Any]] = {}  # functions whose code is another for a while, and twins with their own


def _twin(function: Any) -> Any:
    twin = types.FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__)
    twin.__kwdefaults__ = function.__kwdefaults__
    return twin


def _tell(*args: Any, **kwargs: Any) -> Any:
    import sys

    return sys.modules["revfx.capture.whole"].called("inverse", args, kwargs)


def called(key: Any, args: Any, kwargs: Any) -> Any:
    """Return what a function gives, and record the call; in other threads, and in modules called whole, run it only."""
    function, twin = _told[key]
    recorder: Recorder | None = recording.recorder
    if recorder is None or recorder.suspended:
        return twin(*args, **kwargs)
    with _torch.no_torch_function():
        args, kwargs = recorder.convert((args, kwargs))
        bound = inspect.signature(twin).bind(*args, **kwargs)
        out = faked(recorder, shapes_of(twin, args, kwargs), tensors((args, kwargs)))
        out = recorder.record("call_function", function, args, kwargs, out, [], opaque=True)
        first, x = pytree.tree_leaves(out)[0], next(iter(bound.arguments.values()))
        if isinstance(x, Tensor) and isinstance(first, Tensor):
            y = recorder.nodes[id(first)]
            node: Any = y if y.target is function else y.args[0]
            back = functools.partial(_told_otherwise, twin)
            node.meta["directions"] = (by_call(back, node, recorder.nodes[id(x)], y, function.__name__),)
        return out


def refuse_hidden(recorder: Recorder, args: Any) -> None:
    """Refuse a tensor that the forward made and set as an attribute, where a module that is called whole finds it."""
    if recorder.given is None:
        return
    path, given = recorder.given
    for t in tensors(args):
        made = id(t) in recorder.nodes and not any(n.meta["val"] is t for n in recorder.attributes)
        if made and id(t) not in given:
            text = f"`{path}` reads a tensor that the forward made, and did not give it"
            raise Untraceable(text, opens=path, kind=Reason.HIDDEN_STATE)


def faked(recorder: Recorder, out: Any, given: Iterable[Tensor]) -> Any:
    """Return fake tensors that are like `out`, as they would be made of what is `given`."""
    out = pytree.tree_map_only(Tensor, recorder.to_fake, out)
    needs = torch.is_grad_enabled() and any(t.requires_grad and t.is_floating_point() for t in given)
    with recorder.fake:  # not leaves: code may write to them
        return pytree.tree_map_only(Tensor, lambda t: t.requires_grad_(needs and t.is_floating_point()).clone(), out)


def shapes_of(function: Any, args: Any, kwargs: Any) -> Any:
    """Return what `function` gives of zeros that are like its arguments in shape; a copy of it, where it is a module.
    Untraceable where it can't be called so, or draws and is no module.
    """
    with torch.no_grad(), _torch.no_torch_function(), no_dispatch():
        module = copy.deepcopy(function) if isinstance(function, nn.Module) else None
        drawn = all_generators()

        def like(t: Tensor) -> Tensor:
            return torch.zeros(tuple(t.shape), dtype=t.dtype, device=getattr(t, "fake_device", t.device))

        args, kwargs = pytree.tree_map_only(Tensor, like, (args, kwargs))
        try:
            found = (module or function)(*args, **kwargs)
        except Exception as e:
            text = f"{ASKS}, and `{op_name(function)}` fails for zeros: {e}"
            raise Untraceable(text, kind=Reason.DATA_DEPENDENT) from None
        if module is not None:
            restore(drawn)
        elif drew(drawn, all_generators()) is not None:
            raise Untraceable(ASKS, kind=Reason.DATA_DEPENDENT)
        return found


def _told_otherwise(function: Any, *args: Any, **kwargs: Any) -> Any:
    call = inspect.signature(function).bind(*args, **kwargs)
    call.apply_defaults()
    call.arguments[NAME] = not call.arguments[NAME]
    return function(*call.args, **call.kwargs)
