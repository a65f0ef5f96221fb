"""The readable formula of an inverse: its function runs on names instead of tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from revfx.passes.program import Arc, Program


SUM, PRODUCT, ATOM = 1, 2, 3  # how tightly an expression binds
OPERATORS = {"add": ("+", SUM), "sub": ("-", SUM), "mul": ("*", PRODUCT), "div": ("/", PRODUCT)}
MAX_FORMULA_CHARS = 80  # a longer formula is not readable


def _combine(name: str, a: Any, b: Any) -> Term:
    sign, level = OPERATORS[name]
    return Term(f"{_parenthesize(a, level)} {sign} {_parenthesize(b, level + 1)}", level)


@dataclass(frozen=True, slots=True)
class Term:
    """An expression: arithmetic with it gives a longer one. It resembles the proxies of torch.fx."""

    text: str
    level: int = ATOM

    def __add__(self, other: Any) -> Term:
        return _combine("add", self, other)

    def __radd__(self, other: Any) -> Term:
        return _combine("add", other, self)

    def __sub__(self, other: Any) -> Term:
        return _combine("sub", self, other)

    def __rsub__(self, other: Any) -> Term:
        return _combine("sub", other, self)

    def __mul__(self, other: Any) -> Term:
        return _combine("mul", self, other)

    def __rmul__(self, other: Any) -> Term:
        return _combine("mul", other, self)

    def __truediv__(self, other: Any) -> Term:
        return _combine("div", self, other)

    def __rtruediv__(self, other: Any) -> Term:
        return _combine("div", other, self)

    def __neg__(self) -> Term:
        return Term(f"-{_parenthesize(self, PRODUCT)}", PRODUCT)

    def __getattr__(self, name: str) -> Callable[..., Term]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: Term(f"{_parenthesize(self, ATOM)}.{name}({_arguments(args, kwargs)})")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Term:
        name = getattr(function, "__name__", str(function))
        if name in OPERATORS and len(args) == 2 and not kwargs:
            return _combine(name, *args)
        return Term(f"{name}({_arguments(args, kwargs or {})})")


def _parenthesize(x: Any, level: int) -> str:
    """Return the text of an operand, in parentheses if it binds less tightly than `level`."""
    text = _format(x)
    if isinstance(x, Term) and x.level < level:
        return f"({text})"
    return text


def _format(x: Any) -> str:
    if isinstance(x, Term):
        return x.text
    if isinstance(x, (list, tuple)):
        return f"[{', '.join(map(_format, x))}]"
    return f"{x:g}" if isinstance(x, float) else str(x)


def _arguments(args: Any, kwargs: Mapping[str, Any]) -> str:
    return ", ".join([*map(_format, args), *(f"{k}={_format(v)}" for k, v in kwargs.items())])


def formula(program: Program, arc: Arc, names: Mapping[int, str]) -> str:
    """Return the formula of an arc, such as `x1 <- y1 - f(x2)`.

    Args:
        program: the program of the arc.
        arc: the arc.
        names: other names for some values.
    """
    head, tail = program.values[arc.head].name, [names.get(v, program.values[v].name) for v in arc.tail]
    try:
        term = arc.solve(*map(Term, tail))
        if isinstance(term, Term) and len(term.text) <= MAX_FORMULA_CHARS:
            return f"{head} <- {term.text}"
    except Exception:  # `solve` reads shapes, or other properties of tensors
        pass
    return f"{head} <- {arc.text.partition(' <- ')[2] or ', '.join(tail)}"
