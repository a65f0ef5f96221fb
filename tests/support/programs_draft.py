"""A program in the making: every statement is tried on small real tensors, so that shapes fit and what raises is left
out.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from hypothesis import strategies as st
from programs import Input, Program, arguments, namespace
from programs_parts import IMAGES, ODD, PLAIN, RARE
from torch import Tensor


T = TypeVar("T")
LAYOUTS = ("rows", "rows", "rows", "sequences", "images")


class Draft:
    """The statements so far, the values that they made, and which of these are streams.

    `axis` is the dimension of features; `streams` are names, as are `sides` (tensors that are only read) and `kept`
    (values that may be returned); not `recordable`: what it does may depend on values.
    """

    def __init__(self, draw: Any) -> None:
        self.draw = draw
        self.layout = self.pick(LAYOUTS)
        self.axis = 1 if self.layout == "images" else -1
        self.recordable = not self.chance(1, 32)
        self.rows = self.pick((3, 2, 4, 5, 1, 0) if self.chance(1, 3) else (3, 4))
        self.inputs: list[Input] = []
        self.members: list[str] = []
        self.body: list[str] = []
        self.streams: list[str] = []
        self.sides: list[str] = []
        self.kept: list[str] = []
        self.functions: list[tuple[str, int, int]] = []
        self.names = namespace()
        self.values: dict[str, Any] = {"self": SimpleNamespace(training=True)}
        self.count = 0
        torch.manual_seed(0)

    # --- choices
    def pick(self, options: Sequence[T]) -> T:
        """One of the options; the first are the simplest."""
        return options[self.draw(st.integers(0, len(options) - 1))]

    def number(self, low: int, high: int) -> int:
        """A whole number."""
        return self.draw(st.integers(low, high))

    def chance(self, numerator: int, denominator: int) -> bool:
        """True in so many of cases."""
        return self.draw(st.integers(0, denominator - 1)) >= denominator - numerator

    def fresh(self, stem: str = "h") -> str:
        """A name that is not used yet."""
        self.count += 1
        return f"{stem}{self.count}"

    # --- values
    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a value."""
        return tuple(self.values[name].shape)

    def width(self, name: str) -> int:
        """How many features a value has."""
        return self.shape(name)[self.axis]

    def add_input(self, name: str, width: int, kind: str, needs_grad: bool = True) -> None:
        """Add another argument to the program."""
        shape: tuple[int, ...] = (self.rows, width)
        if kind == "whole":
            shape = (self.rows,)
        elif self.layout == "sequences":
            shape = (self.rows, 2, width)
        elif self.layout == "images":
            shape = (self.rows, width, 2, 2)
        self.inputs.append(Input(name, shape, kind, needs_grad))
        program = Program((self.inputs[-1],), (), (), "None")
        self.values[name] = arguments(program, 0)[1][0]

    # --- statements
    def member(self, constructor: str, stem: str = "f") -> str:
        """The name under which `__init__` puts what `constructor` makes."""
        name = self.fresh(stem)
        statement = f"self.{name} = {constructor}"
        if constructor.startswith("buffer:"):
            statement = f'self.register_buffer("{name}", {constructor.removeprefix("buffer:")})'
            constructor = constructor.removeprefix("buffer:")
        self.members.append(statement)
        setattr(self.values["self"], name, eval(constructor, self.names))
        return f"self.{name}"

    def emit(self, statement: str) -> bool:
        """Whether the statement works on the values so far; if not, it is left out."""
        values = dict(self.values)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                exec(statement, self.names, values)
        except Exception:
            return False
        made = [v for k, v in values.items() if k not in self.values or self.values[k] is not v]
        if any(isinstance(v, Tensor) and v.numel() > 400 for v in made):
            return False
        if any(not isinstance(values.get(s), Tensor) or not values[s].is_floating_point() for s in self.streams):
            return False
        self.values = values
        self.body.append(statement)
        return True

    # --- functions of a stream
    def function(self, reads: str, like: str) -> str:
        """The text of a function of `reads` that has the shape of `like`, but for sizes that only streams differ in."""
        d, out = self.width(reads), self.width(like)
        shared = [name for name, *widths in self.functions if widths == [d, out]]
        if shared and self.chance(1, 6):
            name = self.pick(shared)
        else:
            name = self._module(d, out)
            self.functions.append((name, d, out))
        return self._around(f"{name}({reads})", reads)

    def _module(self, d: int, out: int) -> str:
        if self.layout == "images":
            return self.member(f"{self.pick(IMAGES).__name__}({d}, {out})")
        parts = PLAIN
        if self.chance(1, 4):
            parts = RARE if self.chance(1, 8) else ODD
        return self.member(f"{self.pick(parts).__name__}({d}, {out})")

    def _around(self, text: str, reads: str) -> str:
        """What a user may write around a function's call."""
        if not self.chance(1, 4):
            return text
        side = self.pick(self.sides) if self.sides else reads
        return self.pick(
            (
                f"0.5 * {text}",
                f"torch.tanh({text})",
                f"F.dropout({text}, 0.3, self.training)",
                f"torch.relu({text})",
                f"{text}.square()",
                f"{text} * torch.sigmoid({side}.mean())",
                text.replace(f"({reads})", f"({reads} * 1.5)"),
                text.replace(f"({reads})", f"({reads}.relu())"),
                text.replace(f"({reads})", f"({reads}.contiguous())"),
                text.replace(f"({reads})", f"({reads} + {side})"),
                f"{text}.detach()",
                f"{text} * torch.rand_like({reads}).mean()",
            )
        )

    def two(self) -> tuple[str, str]:
        """Two different streams: one that is changed, one that is read."""
        first = self.pick(self.streams)
        return first, self.pick([s for s in self.streams if s != first])
