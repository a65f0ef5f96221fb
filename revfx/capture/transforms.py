"""Transforms of `torch.distributions`, and of libraries built on it, that say how they are inverted.

What a transform computes is recorded as any other code is. Beside it stands `x = t._inverse(y)`, given the tensors that
the transform holds, such as a conditioner's outputs: for where no operation inside can be solved, as in a spline. It is
a prediction like any other. A transform with a network inside is left out, since a prediction would run that once more.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

from torch import Tensor, fx, nn
from torch.distributions import Transform
from torch.utils import _pytree as pytree

from revfx import _torch
from revfx.capture.untraceable import Untraceable
from revfx.capture.whole import shapes_of
from revfx.eager.modes import recording
from revfx.passes.moves import taken_apart
from revfx.rules import Inverse


if TYPE_CHECKING:
    from revfx.capture.recorder import Recorder


INVERSE = {"_call": "_inverse", "_inverse": "_call", "call_and_ladj": "_inverse"}  # the last one is zuko's
CACHED: dict[str, Any] = {"_inv": None, "_cached_x_y": (None, None)}


@contextmanager
def declared_by_transforms() -> Generator[None]:
    """Return a context in which this thread's recorder is told what transforms made of what."""
    with ExitStack() as stack:
        for cls in _subclasses(Transform):
            for name in INVERSE:
                if callable(own := vars(cls).get(name)):
                    stack.enter_context(mock.patch.object(cls, name, _telling(own, INVERSE[name])))
        yield


def _subclasses(cls: type) -> Iterator[type]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)


def _telling(own: Callable[..., Any], inverse: str) -> Callable[..., Any]:
    @functools.wraps(own)
    def method(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        out = own(self, x, *args, **kwargs)
        recorder = recording.recorder
        if recorder is not None and not recorder.suspended:
            with _torch.no_torch_function():
                _declare(recorder, self, inverse, x, next(iter(pytree.tree_leaves(out)), None))
        return out

    return method


def _declare(recorder: Recorder, transform: Transform, inverse: str, x: Any, y: Any) -> None:
    """Note that `inverse` gives `x` of `y`, if it works for tensors like these, and without a module."""
    of, made = recorder.nodes.get(id(x)), recorder.nodes.get(id(y))
    if of is None or made is None or of is made or (x.shape, x.dtype) != (y.shape, y.dtype):
        return
    node: Any = made if taken_apart(made) is None else made.args[0]
    theirs: tuple[Inverse, ...] = node.meta.get("declared", ())
    held: dict[fx.Node, Tensor] = {}

    def place(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and (id(leaf) in recorder.nodes or id(leaf) in recorder.real):
            fake = recorder.convert(leaf)
            held.setdefault(recorder.nodes[id(fake)], fake)
            return recorder.nodes[id(fake)]
        return leaf

    empty = _mapped(transform, place)
    nodes = (*held,)

    def by(result: Tensor, *tensors: Tensor) -> Tensor:
        values = dict(zip(nodes, tensors, strict=True))
        found = _mapped(empty, lambda leaf: values[leaf] if isinstance(leaf, fx.Node) else leaf)
        return getattr(found, inverse)(result)

    hook = nn.modules.module.register_module_forward_pre_hook(_refuse)
    recording.recorder = None
    try:
        if any(d.solves is of for d in theirs) or shapes_of(by, (y, *held.values()), {}).shape != x.shape:
            return
    except Untraceable:
        return
    finally:
        recording.recorder = recorder
        hook.remove()
    node.meta["declared"] = (*theirs, Inverse(of, by, nodes, result=made, declared=type(transform).__name__))


def _refuse(module: nn.Module, args: Any) -> None:
    raise Untraceable(f"its inverse calls `{type(module).__name__}`")


def _mapped(x: Any, leaf: Callable[[Any], Any]) -> Any:
    """Return a copy of a transform, or of what it holds, with leaves replaced."""
    if isinstance(x, Transform):
        twin = copy.copy(x)
        vars(twin).update({k: CACHED[k] if k in CACHED else _mapped(v, leaf) for k, v in vars(x).items()})
        return twin
    if type(x) in (list, tuple):
        return type(x)(_mapped(v, leaf) for v in x)
    return {k: _mapped(v, leaf) for k, v in x.items()} if type(x) is dict else leaf(x)
