"""Example inputs: the convention that `explain`, `inverse` and `testing` share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def normalize_arguments(args: Any, kwargs: Mapping[str, Any] | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and the keyword arguments of `model(*args, **kwargs)`.

    Args:
        args: a tensor, or a tuple (a list is taken for one) of positional arguments.
        kwargs: keyword arguments by name.

    Raises:
        TypeError: `args` or `kwargs` is something else.
    """
    if isinstance(args, Tensor):
        args = (args,)
    if not isinstance(args, (tuple, list)):
        raise TypeError(
            f"`args` is a {type(args).__name__}, so it is not clear how to call the model. Give a tensor, or a tuple of"
            " all positional arguments: `(x,)` for one."
        )
    if kwargs is not None and not isinstance(kwargs, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"`kwargs` is a {type(kwargs).__name__}, so it is not clear how to call the model. Give a dict of keyword"
            " arguments, and all positional ones as a tuple in `args`."
        )
    return tuple(args), dict(kwargs or {})
