"""The exceptions and warnings that revfx raises, all in one place."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx


class RevfxError(RuntimeError):
    """Base of every error that revfx raises; a RuntimeError, as autograd's own errors are."""


class NotReversibleError(RevfxError):
    """A region that was asked to be reversible is not: carries the `reason` and the `node` that blocks it.

    `node` is the `torch.fx.Node` of the blocking operation, a name, or None where no graph is involved.
    """

    def __init__(self, reason: str, node: fx.Node | str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.node = node


class RegenerationError(RevfxError):
    """A value that the backward needs can't be computed again as it was: it raises, rather than hand back another."""


class BudgetError(RevfxError):
    """A model can't be trained in the memory that is given; the text says in how much it can, and what holds it."""


class WrongArguments(RevfxError):
    """What is wrong with the arguments of a command on the command line."""


class RevfxWarning(UserWarning):
    """A model, or a part of it, is left as it was; the text says which part and why."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why one place of a model stays as it was: the reason, the operation and where the user wrote it."""

    reason: str
    op: str
    where: str

    def __str__(self) -> str:
        return f"{self.where or 'unknown place'}: `{self.op}`: {self.reason}"
