"""What says that a forward can't be recorded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from revfx import _fake
from revfx.ambient import where_raised
from revfx.errors import Reason


EFFECTS = frozenset(
    "register_hook register_post_accumulate_grad_hook retain_grad requires_grad_ backward grad numpy __set__ "
    "__delete__ share_memory_ set_ resize_ resize_as_ detach_ __array__ _make_subclass".split()
)
LOST = "which a recorded graph would not repeat"
KEPT = "which a recorded graph would keep"
OWN_GENERATOR = "a generator of its own"
ASKS = "its Python code depends on the values of a tensor"
GIVEN = f"writes to a list, dict or object that it was given, {LOST}"


@dataclass(eq=False, repr=False)
class Untraceable(Exception):
    """The forward can't be recorded: `reason`, `where` (the user's file and line), the `path` of the module at fault,
    whether it may be recorded where the module `opens`, so that its own code is seen, whether it may be once it has run
    (`once`): a first call sets up what later ones find, and whether it may be where a function is called `whole`.
    """

    reason: str
    where: str = ""
    path: str | None = None
    opens: str | None = None
    once: bool = False
    whole: Callable[..., Any] | None = None
    kind: Reason = Reason.UNTRACEABLE

    def __str__(self) -> str:
        """Return the reason."""
        return self.reason


def untraceable(error: Exception, path: str) -> Untraceable:
    """Return why a forward can't be recorded that raised `error` in the module at `path`.

    The frames in which it was raised are let go, with the tensors in them.
    """
    where, link, seen = where_raised(error), error, set[int]()
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        link.__traceback__ = None  # a frame that knows the error, as one of a `with` may, would else keep itself alive
        link = link.__cause__ or link.__context__
    if isinstance(error, Untraceable):
        return replace(error, where=error.where or where, path=path if error.path is None else error.path)
    if isinstance(error, _fake.DATA_DEPENDENT):
        return Untraceable(ASKS, where, path, kind=Reason.DATA_DEPENDENT)
    text = str(error).splitlines()[0] if str(error) else ""
    return Untraceable(f"running it on fake tensors raised {type(error).__name__}: {text}", where, path)
