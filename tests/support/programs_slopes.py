"""The gradients of random programs against finite differences: an oracle that knows nothing of autograd."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from programs import Program, build
from programs_check import Verdict, finite
from programs_steps import Step, losses_of, run
from programs_ways import found_in
from torch import Tensor

from revfx.converting import convert


STEP = 1e-6  # of the central difference
TOLERANCE = 1e-5  # relative: of the difference, at this step, in fp64


def by_slopes(program: Program) -> Verdict:
    """`convert`'s gradients along a random direction of the parameters, against a difference quotient of the loss.

    Where plain gradients differ from the quotient too (`detach`, rounding, a kink), there is nothing to compare.
    """
    program = replace(program, way="once")
    plain, model = build(program), build(program)
    converted: Any = convert(model)
    want, got = (run(program, m, m).steps[0] for m in (plain, converted))
    directions = _directions(program)
    if want.error or got.error or not finite(want) or not directions:
        return Verdict("nothing to compare", found=found_in(converted))
    quotient = (_loss(program, directions, STEP) - _loss(program, directions, -STEP)) / (2 * STEP)
    (plainly, size), (ours, _) = (_slope(step, directions) for step in (want, got))
    margin = TOLERANCE * (size + abs(quotient))
    if abs(ours - quotient) <= margin:
        return Verdict("same", found=found_in(converted))
    if abs(plainly - quotient) > margin:
        return Verdict("nothing to compare", found=found_in(converted))
    return Verdict("failure", f"a slope is {ours:.9g}, the quotient {quotient:.9g}", found_in(converted))


def _directions(program: Program) -> list[Tensor]:
    """One for each parameter."""
    generator = torch.Generator().manual_seed(program.seed)
    shapes = [p.shape for p in build(program).parameters()]
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


def _loss(program: Program, directions: list[Tensor], size: float) -> float:
    """The loss of the first step with all parameters moved so far."""
    model = build(program)
    for p, d in zip(model.parameters(), directions, strict=True):
        p.data += size * d
    step = run(program, model, model).steps[0]
    tensors = sum(isinstance(y, Tensor) for y in step.outputs)
    outputs, flags = step.outputs[: len(step.outputs) - tensors], iter(step.outputs[len(step.outputs) - tensors :])
    outputs = [y.requires_grad_(next(flags)) if isinstance(y, Tensor) else y for y in outputs]
    return sum(float(loss.detach()) for loss in losses_of(outputs, program.used))


def _slope(step: Step, directions: list[Tensor]) -> tuple[float, float]:
    """What the gradients say of the loss along the directions, and the sum of the sizes of its parts."""
    gradients = step.gradients[len(step.gradients) - len(directions) :]
    parts = [g.double() * d for g, d in zip(gradients, directions, strict=True) if g is not None]
    return sum(float(p.sum()) for p in parts), sum(float(p.abs().sum()) for p in parts)
