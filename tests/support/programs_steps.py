"""Steps of training that random programs take: what each gives and leaves, or what it raises."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from programs import Program, arguments
from programs_parts import Raises
from torch import Tensor, nn
from torch.utils import _pytree as pytree


STEPS = 4  # a converted model learns in the first one, proves in the second one, and is steady then
ULPS = 8  # parameters and inputs are changed by up to so many units in the last place, to see what rounding does
EPS = torch.finfo(torch.float64).eps
Call = Callable[..., Any]


@dataclass
class Step:
    """What one step gives and leaves; `error` is what it raised, in the forward unless `backward`."""

    outputs: list[Any] = field(default_factory=list[Any])
    gradients: list[Tensor | None] = field(default_factory=list[Tensor | None])
    state: list[Tensor] = field(default_factory=list[Tensor])
    error: Exception | None = None
    backward: bool = False


@dataclass
class Run:
    """The steps of a program, and the warnings that were given."""

    steps: list[Step]
    warned: list[warnings.WarningMessage]


def run(program: Program, model: nn.Module, call: Call, perturb: int = 0) -> Run:
    """The program's steps by `call`, which runs `model`'s forward; `perturb` changes the numbers a little.

    The ways to take them: "once"; "retained", the backward twice; "one by one", a backward per output; "two calls"
    before one backward; "twice differentiated"; "raises" from inside f in every second of five steps; "accumulated"
    gradients; "resized", other shapes in every second step; "switched" between training and evaluation, and other
    parameters frozen; "rewritten" buffers, so that masks and permutations are none any more; "looked at" without
    gradients before, and by hooks; "written" to between forward and backward.
    """
    taken: list[Step] = []
    with warnings.catch_warnings(record=True) as warned, torch.random.fork_rng():
        warnings.simplefilter("always")
        torch.manual_seed(program.seed)
        if perturb:
            _perturb([p.data for p in model.parameters()], perturb)
        for number in range(5 if program.way == "raises" else STEPS):
            for m in model.modules():
                if isinstance(m, Raises):
                    m.armed = program.way == "raises" and number % 2 == 1
            taken.append(_step(program, model, call, number, perturb))
            _between(program.way, model, call)
    return Run(taken, warned)


def _between(way: str, model: nn.Module, call: Call) -> None:
    if way != "accumulated":
        model.zero_grad()
    if way == "switched":
        training = not model.training
        for m in (model, call):  # a converted model has a flag of its own
            if isinstance(m, nn.Module):
                m.train(training)
    for i, p in enumerate(model.parameters()):
        p.data.mul_(0.9)
        if way == "switched" and i % 3 == 0:
            p.requires_grad_(not p.requires_grad)
    for b in model.buffers() if way == "rewritten" else ():
        b.copy_(~b if b.dtype == torch.bool else b * 0 if not b.is_floating_point() else b * 0.5)


def _perturb(tensors: Sequence[Tensor], seed: int) -> None:
    """Each element by itself: which of two equal ones is larger is then as undetermined as rounding leaves it.

    Zeros stay zero, since revfx promises that; but for negative seeds.
    """
    generator = torch.Generator().manual_seed(abs(seed))
    for t in tensors:
        for d in (d for d in range(t.dim()) if t.stride(d) == 0):
            t = t.narrow(d, 0, 1)  # of an expanded one
        if t.is_floating_point():
            ulps = (torch.rand(t.shape, generator=generator, dtype=torch.float64) - 0.5) * 2 * ULPS
            t.copy_(t * (1 + ulps * EPS) + (t == 0) * (seed < 0) * ulps * EPS)


def _step(program: Program, model: nn.Module, call: Call, number: int, perturb: int) -> Step:
    way, step, leaves = program.way, Step(), list[Tensor]()
    more = list[Tensor | None]()
    try:
        outputs, losses = list[Any](), list[Tensor]()
        for again in range(2 if way == "two calls" else 1):
            mine, given = arguments(program, 10 * number + again, rows=number % 2 if way == "resized" else 0)
            if perturb:
                with torch.no_grad():
                    _perturb([*mine, *(t for t in given if not t.requires_grad)], perturb)
            leaves += mine
            if way == "looked at":
                with torch.no_grad():
                    call(*given)
            made = pytree.tree_leaves(call(*given))
            outputs += made
            losses += losses_of(made, program.used)
            step.state += [t.detach().clone() for t in given]
        step.outputs = [y.detach().clone() if isinstance(y, Tensor) else y for y in outputs]
        step.outputs += [y.requires_grad for y in outputs if isinstance(y, Tensor)]
        torch.rand(3)  # the backward must not depend on where the generator is then
        step.backward = True
        if way == "written":
            _write(program.seed, leaves, model, outputs)
        with _noted(program, model) if way == "written" else contextlib.nullcontext():
            if losses:
                more = _backward(way, losses, [*leaves, *model.parameters()], outputs)
        step.backward = False
    except Exception as e:
        step.error = e
    gradients = [*(t.grad for t in (*leaves, *model.parameters())), *more]
    step.gradients = [None if g is None else g.detach().clone() for g in gradients]
    step.state += [*(b.clone() for b in model.buffers()), torch.get_rng_state()]
    return step


WRITTEN = "something was written to after the forward"


@contextlib.contextmanager
def _noted(program: Program, model: nn.Module) -> Any:
    """A context that says of an error that something had been written to; not if the program does so itself."""
    try:
        yield
    except Exception as e:
        once = run(dataclasses.replace(program, way="once"), model, model)
        if not any(s.backward for s in once.steps):
            e.args = (f"{e} ({WRITTEN})",)
        raise


def _write(seed: int, leaves: list[Tensor], model: nn.Module, outputs: list[Any]) -> None:
    made = [y for y in outputs if isinstance(y, Tensor) and y.is_floating_point()]
    places = [places for places in (leaves, list(model.parameters()), made) if places]
    if places:
        which = places[seed % len(places)]
        with torch.no_grad(), contextlib.suppress(RuntimeError):  # a view that may not be written to
            which[seed % len(which)].add_(0.5)


def losses_of(outputs: Sequence[Any], used: tuple[int, ...]) -> list[Tensor]:
    """A scalar of each output that needs a gradient and is used: it reads the output and saves it."""
    chosen = [y for i, y in enumerate(outputs) if not used or i in used]
    parts = [y.double() for y in chosen if isinstance(y, Tensor) and y.requires_grad]
    return [
        (torch.linspace(0.5, 1.5 + k, y.numel(), dtype=y.dtype).view(y.shape) * y).sum() + y.sin().sum()
        for k, y in enumerate(parts)
    ]


def _backward(way: str, losses: list[Tensor], wanted: list[Tensor], outputs: list[Any]) -> list[Tensor | None]:
    """Gradients that are not in `.grad`."""
    wanted = [t for t in wanted if t.requires_grad]
    if way == "one by one":
        for loss in losses:
            loss.backward(retain_graph=True)
        return []
    loss, first = torch.stack(losses).sum(), list[Any]()
    if way == "twice differentiated":
        first += torch.autograd.grad(loss, wanted, create_graph=True, allow_unused=True)
        loss = loss + sum(g.square().sum() for g in first if g is not None and g.requires_grad)
    if way == "looked at":
        inner = [y for y in outputs if isinstance(y, Tensor) and y.requires_grad]
        first += torch.autograd.grad(loss, inner, retain_graph=True, allow_unused=True)
        for y in inner:
            y.register_hook(lambda g: g * 2)
    if way == "retained":
        loss.backward(retain_graph=True)
    loss.backward()
    return first
