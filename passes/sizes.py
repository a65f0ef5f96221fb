"""Sizes that may be symbolic: compared without a guard, which would fix the shape that the program accepts."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Generator, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental import symbolic_shapes
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq
from torch.utils import _pytree as pytree

from revfx.passes._torch import GUARDED


NUMBERS = (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)


def as_number(size: Any) -> int:
    """Return a size as a plain number: of a symbolic one the value that the program was traced with; no guard."""
    if isinstance(size, torch.SymInt):
        return int(size.node.hint) if size.node.has_hint() else 0
    return int(size)


def fixed(sizes: Iterable[Any]) -> bool:
    """Return whether all of `sizes` are plain numbers, none of them a symbol."""
    return all(isinstance(n, int) for n in sizes)


def tensors_of(val: Any) -> list[Any]:
    """Return the tensors of a node's result, which may be one itself."""
    return [val] if isinstance(val, Tensor) else [t for t in pytree.tree_leaves(val) if isinstance(t, Tensor)]


def same(a: Iterable[Any], b: Iterable[Any]) -> bool:
    """Return whether two shapes, or strides, are equal for every value of the symbols in them."""
    return statically_known_true(sym_eq(tuple(a), tuple(b)))


@contextlib.contextmanager
def no_new_guards(node: fx.Node) -> Generator[None]:
    """Return a context that ends early, without an error, where something depends on a size that is not fixed."""
    modes = (getattr(t, "fake_mode", None) for t in tensors_of(node.meta["val"]))
    envs = (getattr(mode, "shape_env", None) for mode in modes)
    env: Any = next((e for e in envs if e is not None), None)
    if env is None:
        yield
        return
    reads = any(isinstance(n.meta.get("val"), NUMBERS) for n in node.all_input_nodes)  # a node can't be computed with
    early = (GUARDED, TypeError) if reads else (GUARDED,)
    with contextlib.suppress(*early), muted(symbolic_shapes.__name__), env.error_on_new_guards():
        yield


@contextlib.contextmanager
def muted(name: str) -> Generator[None]:
    """Return a context in which the logger of this name says nothing."""
    log, nothing = logging.getLogger(name), logging.Filter("\0")  # one of its own, as contexts may lie in each other
    log.addFilter(nothing)
    try:
        yield
    finally:
        log.removeFilter(nothing)


# --- operations that read the shape of a tensor alone, written without the tensor: that would look like a use
# What is empty has any numbers: zeros are the same in every run.
FILLED = {"zeros_like": 0, "new_zeros": 0, "empty": 0, "empty_like": 0, "new_empty": 0, "ones_like": 1, "new_ones": 1}
VALUE_AT = {"full_like": 1, "new_full": 2}  # which argument they are filled with
DRAWN = {"rand_like": "rand", "randn_like": "randn"}


def of_its_shape(name: str, args: Any, kwargs: Mapping[str, Any], made: Any) -> tuple[str, Any, dict[str, Any]] | None:
    """Return the name, arguments and options of an operation that makes a tensor like `made` from its shape alone.

    `y = randn_like(a)` is `y = randn(shape of y)`: the same numbers where y is contiguous, and the generator torch's.
    """
    if name not in {*FILLED, *VALUE_AT, *DRAWN} or kwargs.get("generator") is not None or kwargs.get("requires_grad"):
        return None
    strided = isinstance(made, Tensor) and made.layout == torch.strided
    if not strided or not fixed(made.shape) or not made.is_contiguous():
        return None
    options = {"dtype": made.dtype, "device": made.device}
    if name in DRAWN:
        return DRAWN[name], (list(made.shape),), options
    at = VALUE_AT.get(name)
    value = FILLED[name] if at is None else next(iter(args[at:]), kwargs.get("fill_value"))
    return ("full", (list(made.shape), value), options) if isinstance(value, (bool, int, float)) else None
