"""Hypothesis strategies for whole random programs: chains of couplings with other things between them."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from programs import KINDS, Program
from programs_between import BETWEEN, kept
from programs_couplings import BLOCKS, COUPLINGS, Kind, joined, swapped
from programs_draft import Draft


WAYS = (
    "once", "once", "once", "retained", "one by one", "two calls", "twice differentiated", "raises", "accumulated",
    "resized", "switched", "rewritten", "looked at", "written",
)  # fmt: skip


@st.composite
def programs(
    draw: Any, couplings: tuple[Kind, ...] = COUPLINGS, recordable: bool | None = None, short: bool = False
) -> Program:
    """Models that a user might write, and some that nobody should, of these couplings.

    `recordable`: whether the code is such that it can be recorded; None: mostly. `short`: of a few couplings only, as
    compiling takes as long as there are.
    """
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.random.fork_rng():
            draft = Draft(draw)
            draft.recordable = draft.recordable if recordable is None else recordable
            return _program(draft, couplings, short)
    finally:
        torch.set_default_dtype(dtype)


def _program(d: Draft, couplings: tuple[Kind, ...], short: bool) -> Program:
    _enter(d)
    for _ in range(1 if short else d.number(1, 2)):
        _chain(d, couplings, short)
        for _ in range(d.number(0, 2)):
            d.pick(BETWEEN)(d)
    if not d.body:
        d.emit("pass")
    returns, count = _outputs(d)
    used = tuple(i for i in range(count) if d.chance(2, 3)) if d.chance(1, 4) else ()
    return Program(
        tuple(d.inputs), tuple(d.members), tuple(d.body), returns, used, d.pick(WAYS), not d.chance(1, 6),
        d.number(0, 99),
    )  # fmt: skip


def block_programs() -> st.SearchStrategy[Program]:
    """Models with `rev_block` in them."""
    return programs(BLOCKS)


def _enter(d: Draft) -> None:
    """The inputs, and the first streams."""
    count, even = d.pick((2, 2, 2, 3, 4)), not d.chance(1, 5)
    widths = [d.pick((2, 3, 4, 1))] * count if even else [d.pick((1, 2, 3)) for _ in range(count)]
    names = ["a", "b", "c", "d"][:count]
    kind = d.pick(KINDS[:-3]) if d.chance(1, 2) else "plain"
    needs_grad = not d.chance(1, 6)
    if d.chance(1, 4):  # each stream an argument of its own
        for name, width in zip(names, widths, strict=True):
            d.add_input(name, width, d.pick((kind, "plain")), needs_grad)
        d.streams = names
    else:
        d.add_input("x", sum(widths), kind, needs_grad)
        if d.chance(1, 4):
            _stem(d)
        if even and not d.chance(1, 3):
            d.emit(f"{', '.join(names)} = x.chunk({count}, {d.axis})")
        else:
            d.emit(f"{', '.join(names)} = x.split({widths}, {d.axis})")
        d.streams = names
    if d.chance(1, 4):
        d.add_input("side", d.pick((widths[0], 1, 2)), d.pick(("plain", "expanded", "computed")), not d.chance(1, 3))
        d.sides.append("side")
        if d.chance(1, 2) and d.layout != "images":
            width = d.width("side")
            d.emit(f"side = torch.tanh({d.member(f'nn.Linear({width}, {width})')}(side))")
    if d.chance(1, 4):
        _table(d)
    if d.chance(1, 6):
        d.add_input("index", 1, "whole", False)
    if d.chance(1, 8):
        d.add_input("flags", widths[0], "boolean", False)


def _table(d: Draft) -> None:
    """What follows from parameters and constants alone, and is read at any depth."""
    n, more = d.width(d.streams[0]), ", 1, 1" * (d.layout == "images")
    weight = d.member(f"nn.Parameter(torch.randn(2, {n}{more}))", "w")
    made = (
        f"{weight}[:1]",
        f"{weight}[:1].tanh()",
        f"torch.arange({n}).view(1, {n}{more}) * 0.1",
        f"F.embedding(torch.zeros(1, dtype=torch.long), {weight})",
        f"{weight}.sum(0, keepdim=True).expand({d.streams[0]}.shape)",
    )
    if d.emit(f"table = {d.pick(made)}"):
        d.sides.append("table")


def _stem(d: Draft) -> None:
    n = d.width("x")
    f = d.member(f"nn.Conv2d({n}, {n}, 1)" if d.layout == "images" else f"nn.Linear({n}, {n})", "stem")
    bias = d.member(f"nn.Parameter(torch.zeros({1 if d.layout == 'images' else n}))", "bias")
    d.emit(
        d.pick(
            (
                f"x = {f}(x)",
                f"x = torch.relu({f}(x))",
                f"x = F.relu({f}(x), inplace=True) * 0.5",
                f"x = F.dropout({f}(x), 0.3, self.training)",
                "x = x * 1.5",
                "x = x.double()",
                f"x = {f}(x).clamp(min=0) + {bias}",
            )
        )
    )


def _chain(d: Draft, couplings: tuple[Kind, ...], short: bool) -> None:
    """A few kinds of couplings, again and again."""
    pattern = [d.pick(couplings) for _ in range(d.number(1, 2 if short else 3))]
    disturbed = d.chance(1, 3)
    for _ in range(d.number(2, 3 if short else 4)):
        for kind in pattern:
            if len(d.streams) < 2:
                joined(d)
            if len(d.streams) >= 2:
                kind(d)
        if disturbed and d.chance(1, 2) and len(d.streams) >= 2:
            d.pick(BETWEEN)(d)
        if d.chance(1, 4):
            kept(d)
        if d.chance(1, 4):
            swapped(d)


def _outputs(d: Draft) -> tuple[str, int]:
    """What the model returns, and how many tensors that is."""
    more = [k for k in d.kept if d.chance(2, 3)]
    together = f"torch.cat([{', '.join(d.streams)}], {d.axis})"
    kind = d.number(0, 6)
    values = d.streams if kind < 4 else [together]
    values = [*values, *more]
    if kind == 6 and d.chance(1, 2):
        values = [f"({v}) * 1" for v in values]
    if kind == 3:
        return "{" + ", ".join(f"'y{i}': {v}" for i, v in enumerate(values)) + "}", len(values)
    if len(values) == 1:
        return values[0], 1
    return f"({', '.join(values)}, )", len(values)
