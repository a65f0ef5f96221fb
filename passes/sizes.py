"""Comparisons of symbolic sizes that add no guard: a guard would restrict the shapes that a compiled graph accepts."""

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
    """Return a size as a plain number, without a guard; for a symbolic one its value in the traced call."""
    if isinstance(size, torch.SymInt):
        return int(size.node.hint) if size.node.has_hint() else 0
    return int(size)


def is_fixed(sizes: Iterable[Any]) -> bool:
    """Return whether all of `sizes` are plain numbers, not symbols."""
    return all(isinstance(n, int) for n in sizes)


def tensors_of(val: Any) -> list[Any]:
    """Return the tensors in a node's result."""
    if isinstance(val, Tensor):
        return [val]
    return [t for t in pytree.tree_leaves(val) if isinstance(t, Tensor)]


def is_same_shape(a: Iterable[Any], b: Iterable[Any]) -> bool:
    """Return whether two shapes, or strides, are equal for every value of the symbols in them."""
    return statically_known_true(sym_eq(tuple(a), tuple(b)))


@contextlib.contextmanager
def no_new_guards(node: fx.Node) -> Generator[None]:
    """Return a context that ends early, without an error, if something in it depends on a symbolic size."""
    env: Any = None
    for t in tensors_of(node.meta["val"]):
        env = getattr(getattr(t, "fake_mode", None), "shape_env", None)
        if env is not None:
            break
    if env is None:
        yield
        return
    early = [GUARDED]
    if any(isinstance(n.meta.get("val"), NUMBERS) for n in node.all_input_nodes):
        early.append(TypeError)  # arithmetic with the node of a number
    with contextlib.suppress(*early), mute_logger(symbolic_shapes.__name__), env.error_on_new_guards():
        yield


@contextlib.contextmanager
def mute_logger(name: str) -> Generator[None]:
    """Return a context that silences the logger `name`."""
    log, silence = logging.getLogger(name), logging.Filter("\0")  # a new filter for each context, as they nest
    log.addFilter(silence)
    try:
        yield
    finally:
        log.removeFilter(silence)


# --- operations that read only the shape of a tensor, rewritten without it: it would count as a reader
# Uninitialized tensors become zeros, which are the same in every run.
FILL_VALUES = {
    "zeros_like": 0, "new_zeros": 0, "empty": 0, "empty_like": 0, "new_empty": 0, "ones_like": 1, "new_ones": 1
}  # fmt: skip
FILL_ARGUMENTS = {"full_like": 1, "new_full": 2}  # the position of the fill value
RANDOM_OPS = {"rand_like": "rand", "randn_like": "randn"}


def replace_shape_reader(
    name: str, args: Any, kwargs: Mapping[str, Any], made: Any
) -> tuple[str, Any, dict[str, Any]] | None:
    """Express an operation that reads only the shape of its operand without the operand.

    `y = randn_like(a)` becomes `y = randn(y.shape)`. The numbers are the same if y is contiguous and drawn from torch's
    own generator.

    Args:
        name: the name of the operation.
        args: its positional arguments.
        kwargs: its keyword arguments.
        made: its fake result.

    Returns:
        The name, arguments and keyword arguments of the new operation. None if there is none.
    """
    if name not in {*FILL_VALUES, *FILL_ARGUMENTS, *RANDOM_OPS}:
        return None
    if kwargs.get("generator") is not None or kwargs.get("requires_grad"):
        return None
    if not isinstance(made, Tensor) or made.layout != torch.strided:
        return None
    if not is_fixed(made.shape) or not made.is_contiguous():
        return None
    shape, options = list(made.shape), {"dtype": made.dtype, "device": made.device}
    if name in RANDOM_OPS:
        return RANDOM_OPS[name], (shape,), options
    if name in FILL_VALUES:
        return "full", (shape, FILL_VALUES[name]), options
    value = next(iter(args[FILL_ARGUMENTS[name] :]), kwargs.get("fill_value"))
    if not isinstance(value, (bool, int, float)):
        return None
    return "full", (shape, value), options
