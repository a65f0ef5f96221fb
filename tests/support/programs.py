"""A random program as frozen data: its inputs, its modules and its statements, which print as a Python class and run as
that class.
"""

from __future__ import annotations

import itertools
import linecache
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import programs_parts
import torch
from helpers import lines
from torch import Tensor, nn
from torch.nn import functional as F

from revfx import rev_block


Couple = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Input:
    """An argument: `kind` says how its memory lies and what its values are, see `_given`."""

    name: str
    shape: tuple[int, ...]
    kind: str = "plain"
    needs_grad: bool = True


KINDS = ("plain", "relu", "turned", "strided", "offset", "expanded", "computed", "view", "constant", "zeros", "halves",
         "levels", "padded", "padded levels", "rows", "large", "single", "whole",
         "boolean")  # fmt: skip


@dataclass(frozen=True)
class Program:
    """A model and how it is used.

    `members` are statements of `__init__`, `body` statements of `forward`; `used` are the places among the flattened
    outputs that the loss reads (none: all). `way` is how steps are taken, see `programs_steps`.
    """

    inputs: tuple[Input, ...]
    members: tuple[str, ...]
    body: tuple[str, ...]
    returns: str
    used: tuple[int, ...] = ()
    way: str = "once"
    training: bool = True
    seed: int = 0

    @property
    def source(self) -> str:
        """The class as Python."""
        arguments = ", ".join(f"{i.name}: Tensor" for i in self.inputs)
        members, body = ("".join(_indented(s) for s in part) for part in (self.members, self.body))
        return (
            f"class Model(nn.Module):\n    def __init__(self) -> None:\n        super().__init__()\n{members}\n"
            f"    def forward(self, {arguments}) -> Any:\n{body}        return {self.returns}\n"
        )

    def __str__(self) -> str:
        """The program as one reads it."""
        inputs = "".join(f"# {i.name}: {i.kind} {list(i.shape)}{', grad' * i.needs_grad}\n" for i in self.inputs)
        used = f", the loss reads outputs {list(self.used)}" if self.used else ""
        return f"# {self.way}, {'train' if self.training else 'eval'}, seed {self.seed}{used}\n{inputs}{self.source}"


def _indented(statement: str) -> str:
    return "".join(f"        {line}\n" for line in statement.splitlines())


def written_out(
    a: Tensor, b: Tensor, f: Any, g: Any, layers: int, f_side: Any = None, g_side: Any = None, **_: Any
) -> tuple[Tensor, Tensor]:
    """What `rev_block` computes, as its user could have written it."""
    fs, gs = ([h] * layers if callable(h) and not isinstance(h, nn.ModuleList) else list(h) for h in (f, g))
    sides = (None if isinstance(side, (list, tuple, dict)) and not side else side for side in (f_side, g_side))
    return lines(fs, gs)(a, b, *sides)


def namespace(couple: Couple = written_out) -> dict[str, Any]:
    """The names that a program may use."""
    parts = {k: v for k, v in vars(programs_parts).items() if not k.startswith("_")}
    return {**parts, "torch": torch, "nn": nn, "F": F, "Tensor": Tensor, "Any": Any, "couple": couple}


RECENT = 32  # programs whose source is kept for tracebacks
_numbers = itertools.count()
_recent = deque[str]()


def build(program: Program, couple: Couple = written_out) -> nn.Module:
    """The model, its weights drawn from the program's seed; `couple` is `written_out` or `rev_block`."""
    module = ModuleType(f"program_{next(_numbers)}")  # dynamo looks globals up in modules
    vars(module).update(namespace(couple))
    source, file = program.source, f"<{module.__name__}>"
    sys.modules[module.__name__] = module
    linecache.cache[file] = (len(source), None, source.splitlines(True), file)
    _recent.append(module.__name__)
    for old in [_recent.popleft()] if len(_recent) > RECENT else []:
        del sys.modules[old], linecache.cache[f"<{old}>"]
    exec(compile(source, file, "exec"), vars(module))
    torch.manual_seed(program.seed)
    return module.Model().train(program.training)


def arguments(program: Program, step: int, rows: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """(leaves whose gradients are compared, arguments of the forward) of the given step, with so many more rows."""
    generator = torch.Generator().manual_seed(1000 * program.seed + step)
    inputs = [replace(i, shape=(i.shape[0] + rows, *i.shape[1:])) for i in program.inputs]
    pairs = [_given(i, generator) for i in inputs]
    return [leaf for leaf, _ in pairs if leaf.requires_grad], [given for _, given in pairs]


def _given(spec: Input, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A leaf, and the argument that is made of it."""
    shape, kind = spec.shape, spec.kind
    if kind == "whole":
        t = torch.randint(0, 3, shape, generator=generator)
        return t, t
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind == "boolean":
        return x > 0, x > 0
    if kind == "relu":
        x = x.relu()
    elif kind in ("zeros", "large"):
        x = {"zeros": x * 0, "large": 1e3 * x}[kind]
    elif kind in ("halves", "levels", "padded", "padded levels"):
        x = (40 * x).round() / 255 if "levels" in kind else (2 * x).round() / 2
        if "padded" in kind:  # half of it: one stream starts as zeros
            x[:, x.shape[1] // 2 :] = 0
    elif kind == "rows":  # every other one holds one number
        x[::2] = -0.4242128
    elif kind == "single":
        x = x.float()
    elif kind == "constant":
        x = torch.full(shape, 0.5, dtype=torch.float64)
    elif kind == "turned":
        x = x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))
    elif kind == "strided":
        x = torch.stack([x, -x], -1)[..., 0]
    elif kind == "offset":
        x = torch.cat([x.new_zeros(3), x.flatten()])[3:].view(shape)
    elif kind == "expanded":
        x = x[:1].expand(shape)
    if kind == "view":
        leaf = torch.cat([x, x]).requires_grad_(spec.needs_grad)
        return leaf, leaf[: shape[0]]
    leaf = x.requires_grad_(spec.needs_grad)
    return (leaf, leaf.sin()) if kind == "computed" else (leaf, leaf)


# --- making a failing program smaller
def smaller(program: Program) -> Iterator[Program]:
    """Programs with one thing less, the largest parts first."""
    if pruned(program) != program:
        yield pruned(program)
    for size in (8, 4, 2, 1):
        for at in range(0, len(program.body), size):
            yield replace(program, body=program.body[:at] + program.body[at + size :])
    yield from (replace(program, returns=r) for r in _fewer(program.returns))
    for at in range(len(program.members)):
        yield replace(program, members=program.members[:at] + program.members[at + 1 :])
    for at, spec in enumerate(program.inputs):
        rest = program.inputs[:at] + program.inputs[at + 1 :]
        yield replace(program, inputs=rest)
        for simpler in (replace(spec, kind="plain"), replace(spec, needs_grad=False)):
            if simpler != spec and spec.kind not in ("whole", "boolean"):
                yield replace(program, inputs=(*program.inputs[:at], simpler, *program.inputs[at + 1 :]))
    for simple in (replace(program, way="once"), replace(program, used=()), replace(program, training=False)):
        if simple != program:
            yield simple


def _fewer(returns: str) -> Iterator[str]:
    parts = returns.strip("()").split(", ")
    if returns.startswith("(") and len(parts) > 2 and "(" not in returns[1:-1]:
        for at in range(len(parts) - 1):
            yield "(" + ", ".join([*parts[:at], *parts[at + 1 : -1], ""]) + ")"


def pruned(program: Program) -> Program:
    """The program without members that nothing mentions."""
    text = "\n".join((*program.body, program.returns))
    mentioned = set(re.findall(r"self\.(\w+)", text))
    members = tuple(m for m in program.members if re.findall(r"self\.(?:register_buffer\(\")?(\w+)", m)[0] in mentioned)
    return replace(program, members=members)


def minimised(program: Program, fails: Callable[[Program], bool], seconds: float = 60.0) -> Program:
    """The smallest program on the way down that still `fails`; it ends after so many seconds."""
    end = time.monotonic() + seconds
    while True:
        tried = (p for p in smaller(program) if time.monotonic() < end and fails(p))
        found = next(tried, None)
        if found is None:
            return program
        program = found


def blocked(a: Tensor, b: Tensor, f: Any, g: Any, layers: int, *sides: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """`rev_block`, as `couple`."""
    return rev_block(a, b, f, g, layers, *sides, **options)
