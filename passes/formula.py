"""The formula of an inverse, as a line to read: its function is run on names instead of tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from revfx.passes.program import Arc, Program


SUM, PRODUCT, ATOM = 1, 2, 3  # how tightly an expression binds
OPERATORS = {"add": ("+", SUM), "sub": ("-", SUM), "mul": ("*", PRODUCT), "div": ("/", PRODUCT)}
LONGEST = 80  # characters of an expression that is still read


def _joined(name: str, a: Any, b: Any) -> Term:
    sign, level = OPERATORS[name]
    return Term(f"{_within(a, level)} {sign} {_within(b, level + 1)}", level)


def _operator(name: str, turned: bool = False) -> Callable[[Term, Any], Term]:
    return lambda term, other: _joined(name, other, term) if turned else _joined(name, term, other)


@dataclass(frozen=True, slots=True)
class Term:
    """An expression: computing with it gives a longer one. After the proxies of torch.fx, for one line."""

    text: str
    level: int = ATOM

    __add__, __radd__ = _operator("add"), _operator("add", turned=True)
    __sub__, __rsub__ = _operator("sub"), _operator("sub", turned=True)
    __mul__, __rmul__ = _operator("mul"), _operator("mul", turned=True)
    __truediv__, __rtruediv__ = _operator("div"), _operator("div", turned=True)

    def __neg__(self) -> Term:
        return Term(f"-{_within(self, PRODUCT)}", PRODUCT)

    def __getattr__(self, name: str) -> Callable[..., Term]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: Term(f"{_within(self, ATOM)}.{name}({_arguments(args, kwargs)})")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Term:
        name = getattr(function, "__name__", str(function))
        if name in OPERATORS and len(args) == 2 and not kwargs:
            return _joined(name, *args)
        return Term(f"{name}({_arguments(args, kwargs or {})})")


def _within(x: Any, level: int) -> str:
    text = _format(x)
    return f"({text})" if isinstance(x, Term) and x.level < level else text


def _format(x: Any) -> str:
    if isinstance(x, Term):
        return x.text
    if isinstance(x, (list, tuple)):
        return "[" + ", ".join(_format(i) for i in x) + "]"
    return f"{x:g}" if isinstance(x, float) else str(x)


def _arguments(args: Any, kwargs: Mapping[str, Any]) -> str:
    return ", ".join([*(_format(a) for a in args), *(f"{k}={_format(v)}" for k, v in kwargs.items())])


def formula(program: Program, arc: Arc, names: Mapping[int, str]) -> str:
    """Return `x1 <- y1 - f(x2)` for an arc; `names` renames values."""
    head, tail = program.values[arc.head].name, [names.get(v, program.values[v].name) for v in arc.tail]
    try:
        found = arc.solve(*map(Term, tail))
        if isinstance(found, Term) and len(found.text) <= LONGEST:
            return f"{head} <- {found.text}"
    except Exception:  # it asks for shapes, or other properties of tensors
        pass
    return f"{head} <- {arc.text.partition(' <- ')[2] or ', '.join(tail)}"
