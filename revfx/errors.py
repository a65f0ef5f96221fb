"""The exceptions and warnings of revfx, and the kinds of its refusals.

A message has three parts, in this order: the event, the consequence, the remedy.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import fx


class RevfxError(RuntimeError):
    """Base of every error that revfx raises; a RuntimeError, as autograd's own errors are."""


class NotReversibleError(RevfxError):
    """A region that has to be reversible is not.

    `reason` is the text. `node` is the blocking operation: a `torch.fx.Node`, a name, or None if no graph is involved.
    `refusals` are all blocking places, each with its kind and remedy.
    """

    def __init__(self, reason: str, node: fx.Node | str | None = None, refusals: tuple[Refusal, ...] = ()) -> None:
        super().__init__(reason)
        self.reason = reason
        self.node = node
        self.refusals = refusals


class RegenerationError(RevfxError):
    """A value that the backward needs can't be recomputed bit for bit, so the backward stops."""


class BudgetError(RevfxError):
    """No plan stays within a memory budget.

    `least`: the smallest feasible budget in bytes, `asked`: the refused one. The text names the layer that holds the
    peak of the smallest plan.
    """

    def __init__(self, text: str, least: int, asked: int) -> None:
        super().__init__(text)
        self.least = least
        self.asked = asked

    def __reduce__(self) -> tuple[type[BudgetError], tuple[str, int, int]]:
        """Pickle the arguments, so that a process can raise the error for another one."""
        return BudgetError, (str(self), self.least, self.asked)


class RevfxWarning(UserWarning):
    """Base of every warning of revfx."""


class NotConvertedWarning(RevfxWarning):
    """A model, or a part of it, runs as it was: it stores the activations that revfx would free."""


class NondeterminismWarning(RevfxWarning):
    """A recomputed value differs from the forward's by rounding: gradients are accurate to that."""


class BudgetWarning(RevfxWarning):
    """A memory budget of revfx or torch is exceeded, or may be."""


# --- the place in the user's code
_OURS = [Path(torch.__file__).parent, Path(__file__).parent, Path(__file__).parent.parent / "passes"]
_FILES = (*(f"{folder}{os.sep}" for folder in _OURS), contextlib.__file__)


def is_users(file: str) -> bool:
    """Return whether a file is the user's: neither torch's nor revfx's, nor generated code."""
    return not file.startswith((*_FILES, "<"))


def is_revfx(file: str) -> bool:
    """Return whether a file is one of revfx."""
    return file.startswith(_FILES[1])


def warn(text: str, category: type[RevfxWarning]) -> None:
    """Warn at the innermost frame outside of torch and revfx, or at the outermost one."""
    frame: Any = inspect.currentframe()
    while frame.f_back is not None and not is_users(frame.f_code.co_filename):
        frame = frame.f_back
    module, registry = frame.f_globals.get("__name__"), frame.f_globals.setdefault("__warningregistry__", {})
    warnings.warn_explicit(text, category, frame.f_code.co_filename, frame.f_lineno, module, registry)


# --- refusals
FOR_ANY_MODEL = "use `revfx.convert(model, memory=0.5)`, which works for any model"


class Reason(Enum):
    """A kind of refusal: its meaning, and its `remedy`, the user's way out."""

    NO_COUPLING = (
        "a value is added to something computed from itself, as in a residual block",
        f"split the stream in two: `y1 = x1 + f(x2); y2 = x2 + g(y1)`, or {FOR_ANY_MODEL}",
    )
    NON_INVERTIBLE = (
        "the operation discards information",
        f"move it into the function that is added to the other stream, or {FOR_ANY_MODEL}",
    )
    NO_RULE = (
        "the operation has no inverse rule",
        "give it one by `revfx.register_inverse`, or move it into the function of a coupling",
    )
    ZERO_FACTOR = (
        "a factor may be zero",
        "use a factor that is bounded away from zero: `exp(tanh(s))`, or `sigmoid(s) + 0.1`",
    )
    LOSES_BITS = (
        "a stream changes its dtype",
        "keep each stream in one dtype, float32 if possible, and cast inside the functions",
    )
    LAYOUT = (
        "a broadcast, a shape or an index is not supported",
        "add something of the stream's own shape, for instance by `expand`; index along one dimension, by constants or"
        " buffers",
    )
    ROUNDING = (
        "an operation compares elements, and an inverse that rounds would change the result",
        "use `revfx.convert(model)`, which corrects rounding, or let a layer that mixes the data, such as a linear"
        " layer, come first",
    )
    VALUE_LOST = (
        "a value is read nowhere that could give it back",
        "return it, or compute it from what is returned",
    )
    WRITES_IN_PLACE = (
        "an operation writes to memory that something else reads",
        "work on a copy: `x.clone()`, or write `x = x + ...`",
    )
    DATA_DEPENDENT = (
        "Python code or a size depends on the values of a tensor",
        f"use `torch.where` for the branch, or {FOR_ANY_MODEL}",
    )
    HIDDEN_STATE = (
        "the forward reads state that is not tracked",
        "use `register_buffer` for tensors, and draw random numbers from torch's default generator",
    )
    OPAQUE = (
        "an operation of a compiled graph runs once",
        "call it inside the function that is added to the other stream, or use `revfx.convert` without `torch.compile`",
    )
    NOT_REPLAYED = (
        "the operators of a layer can't be run again with the same bits",
        "let operators of torch, with deterministic kernels, compute what it reads",
    )
    NOT_COMPILED = (
        "the compiler does not take a function or a graph",
        "run with TORCH_LOGS=graph_breaks for the details, or leave out `compile=True`",
    )

    def __init__(self, meaning: str, remedy: str) -> None:
        self.meaning: str = meaning
        self.remedy: str = remedy

    def __repr__(self) -> str:
        return f"Reason.{self.name}"


@dataclass(frozen=True, slots=True)
class Cause:
    """The kind of a refusal with its specific `text`, before its place is known."""

    kind: Reason
    text: str

    def to_refusal(self, op: str, where: str, *others: str) -> Refusal:
        """Return the refusal for the operation `op` at the place `where`; `others` block with it."""
        return Refusal(self.kind, (op, *others), where, self.text)


@dataclass(frozen=True, slots=True)
class Refusal:
    """A place in a model that is left as it was.

    `nodes` are the names of the blocking operations, first that at `where` (file:line). `detail` is the reason in
    words.
    """

    kind: Reason
    nodes: tuple[str, ...]
    where: str
    detail: str = ""

    @property
    def op(self) -> str:
        """The name of the operation at `where`."""
        return self.nodes[0] if self.nodes else ""

    def __str__(self) -> str:
        return f"{self.where or 'unknown place'}: `{self.op}`: {self.detail or self.kind.meaning}"


MAX_REFUSALS = 8  # refusals in one message


def name_of(module: torch.nn.Module) -> str:
    """Return the name of the module's class, without revfx's subclass."""
    return getattr(type(module), "_revfx_base", type(module)).__name__


def list_refusals(refusals: Sequence[Refusal]) -> str:
    """Format refusals, and the remedies of their kinds, for the end of a message."""
    shown = refusals[:MAX_REFUSALS]
    lines = [f"  {refusal}" for refusal in shown] or ["  no operation is inverted"]
    remedies = [*dict.fromkeys(refusal.kind.remedy for refusal in shown)]
    if not any("memory=" in remedy for remedy in remedies):
        remedies.append(FOR_ANY_MODEL)
    lines += [f"What to do: {remedy}." for remedy in remedies]
    return "\n".join(lines)
