"""What random programs are checked for: whether a step leaves what plain autograd leaves, whichever way it is taken."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from programs import Program, build
from programs_steps import WRITTEN, Run, Step, run
from torch import Tensor

from revfx.errors import RevfxError, RevfxWarning


TOLERANCE = 1e-9  # relative, in fp64
SELECTING = re.compile(r"\.(amax|amin|max|min|median|sort|argsort|argmax)\(|maximum|pooled|topk")
CONTRACTING = re.compile(r"exp\(-30")  # factors by which rounding may grow as far as regions let it, sqrt(eps)
MARGIN = 1e3  # by which a gradient may be off further than that change makes it: regions have more roundings


@dataclass(frozen=True)
class Verdict:
    """How a program went: `same`, a refusal, something that can't be compared, or `failure` with the reason."""

    kind: str
    text: str = ""
    found: bool = False


# --- comparing
def error_between(got: Sequence[Tensor | None], want: Sequence[Tensor | None]) -> float:
    """The largest relative error; a gradient under 1e-4 of the largest one's norm is measured against that."""
    both = zip(got, want, strict=True)
    pairs = [(g.double(), w.double()) for g, w in both if g is not None and w is not None]
    norms = [float(w.norm()) for _, w in pairs]
    floor = 1e-4 * max(norms, default=0.0) or 1.0
    errors = [float((g - w).norm()) / max(n, floor) for (g, w), n in zip(pairs, norms, strict=True)]
    return max((e if e == e else float("inf") for e in errors), default=0.0)


def alike(a: Any, b: Any) -> bool:
    """Whether two outputs or states are the same, bit for bit."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is type(b) and a == b
    return (a.shape, a.dtype) == (b.shape, b.dtype) and torch.equal(a.nan_to_num(), b.nan_to_num())


def close(a: Any, b: Any, eps: float) -> bool:
    """Whether two outputs or states are the same up to rounding of `eps`, or of their dtype where that is more."""
    if alike(a, b):
        return True
    if not eps or not isinstance(a, Tensor) or not isinstance(b, Tensor) or not b.is_floating_point():
        return False
    off = MARGIN * max(eps, torch.finfo(a.dtype).eps)
    return (a.shape, a.dtype) == (b.shape, b.dtype) and error_between([a], [b]) <= off


def finite(step: Step) -> bool:
    """Whether a step's outputs and gradients are all finite numbers."""
    tensors = [t for t in (*step.outputs, *step.gradients) if isinstance(t, Tensor)]
    return all(bool(t.isfinite().all()) for t in tensors)


def nearer(got: Run, one: Run, other: Run) -> Run:
    """What `got` may be compared with where either of two runs is right: of each value the one that is nearer to it."""
    steps: list[Step] = []
    for g, a, b in zip(got.steps, one.steps, other.steps, strict=True):
        sizes = [(len(s.outputs), len(s.gradients), len(s.state)) for s in (g, a, b)]
        if any(s.error is not None for s in (g, a, b)) or len(set(sizes)) > 1:
            steps.append(b if g.error is not None and said(g.error) == said(b.error) else a)
            continue
        outputs = list(map(_nearer, g.outputs, a.outputs, b.outputs))
        gradients = list(map(_nearer, g.gradients, a.gradients, b.gradients))
        steps.append(Step(outputs, gradients, list(map(_nearer, g.state, a.state, b.state))))
    return Run(steps, [*one.warned, *other.warned])


def _nearer(got: Any, one: Any, other: Any) -> Any:
    if alike(got, other):  # where both are no numbers, too
        return other
    if alike(got, one) or not isinstance(got, Tensor) or not isinstance(other, Tensor) or got.shape != other.shape:
        return one
    return one if isinstance(one, Tensor) and error_between([got], [one]) <= error_between([got], [other]) else other


ONCE = "Torchinductor does not support code generation for complex"  # which it says once per process


def compare(
    got: Run, want: Run, allowed: Callable[[int], float], eps: float = 0.0, tolerance: float = TOLERANCE
) -> Verdict:
    """The verdict on `got`, given what plain autograd does.

    Gradients may be off by `tolerance`, and by what `allowed` says of a step; outputs are the same bit for bit, but for
    kernels that round by `eps` otherwise.
    """
    for number, (g, w) in enumerate(zip(got.steps, want.steps, strict=True)):
        at = f"step {number}: "
        if w.error is not None:
            if w.backward and g.error is None and written(w.error):
                return Verdict("failure", f"{at}nothing was raised where plain raises {w.error!r}")
            if w.backward:
                return Verdict("plain raises")
            if documented(g.error):
                return Verdict(refusal(g.error))
            if type(g.error) is not type(w.error) or said(g.error) != said(w.error):
                return Verdict("failure", f"{at}raised {g.error!r} where plain raises {w.error!r}")
            if len(g.state) != len(w.state) or not all(map(alike, g.state, w.state)):
                return Verdict("failure", f"{at}another state after an exception")
            continue
        if g.error is not None:
            if documented(g.error):
                return Verdict(refusal(g.error))
            if written(g.error):
                return Verdict("raised as a tensor was written to after the forward")
            return Verdict("failure", f"{at}raised {type(g.error).__name__}: {g.error}")
        if not finite(w):
            return Verdict("not finite")
        same = partial(close, eps=eps)
        if len(g.outputs) != len(w.outputs) or not all(map(same, g.outputs, w.outputs)):
            return Verdict("failure", f"{at}other outputs")
        if len(g.state) != len(w.state) or not all(map(same, g.state, w.state)):
            return Verdict("failure", f"{at}another state")
        if [t is None for t in g.gradients] != [t is None for t in w.gradients]:
            return Verdict("failure", f"{at}a gradient is missing, or there is one too many")
        pairs = [(a, b) for a, b in zip(g.gradients, w.gradients, strict=True) if a is not None and b is not None]
        if any((a.shape, a.dtype) != (b.shape, b.dtype) for a, b in pairs):
            return Verdict("failure", f"{at}a gradient has another shape or dtype")
        error = error_between(g.gradients, w.gradients)
        if error > max(tolerance, MARGIN * eps) and error > allowed(number):
            return Verdict("failure", f"{at}a gradient is off by {error:.1e}")
    theirs = {said(w.message) for w in want.warned}
    for w in got.warned:
        if not issubclass(w.category, RevfxWarning) and said(w.message) not in theirs and ONCE not in str(w.message):
            return Verdict("failure", f"another warning: {w.message}")
    return Verdict("same")


def said(error: object) -> str:
    """An error's or a warning's text, whatever the names of the backend and the file that it came through."""
    return re.sub(r"backend='\w+'|<program_\d+>", "", str(error))


def written(error: Exception) -> bool:
    """Whether autograd raised because a tensor was written to after the forward, or a cut that a graph keeps."""
    return WRITTEN in str(error) or re.search(r"is output \d+ of CompiledFunction", str(error)) is not None


def documented(error: Exception | None) -> bool:
    """Whether an error is one that revfx promises in place of a wrong gradient."""
    texts = ("revfx: ", "`f` of layer ", "`g` of layer ")  # of a compiled graph; of `rev_block`, a ValueError
    return isinstance(error, RevfxError) or (error is not None and str(error).startswith(texts))


def refusal(error: Exception | None) -> str:
    """The kind of refusal that a documented error is: its class, and its text without names and numbers."""
    words = re.sub(r"`[^`]*`|<[^>]*>|[\d().,:]+", "", str(error)).split()
    return f"raised {type(error).__name__}: {' '.join(words[:7])}"


def conditioning(program: Program, want: Run) -> Callable[[int], float]:
    """By step, how far gradients may be off: what a change by a few units in the last place does to plain ones.

    Which of the elements that are equal, as those that zeros give are, a maximum selects is not promised.
    """
    runs: list[Run] = []
    seeds = (1, 2, 3, 4, -1, -2) if SELECTING.search(program.source) else (1, 2, 3, 4)

    def allowed(number: int) -> float:
        if not runs:
            for seed in seeds:
                model = build(program)
                runs.append(run(program, model, model, perturb=seed))
        steps = [r.steps[number] for r in runs if r.steps[number].error is None]
        errors = [error_between(s.gradients, want.steps[number].gradients) for s in steps]
        grown = torch.finfo(torch.float64).eps ** 0.5 if CONTRACTING.search(program.source) else 0.0
        return max(MARGIN * max(errors, default=0.0), grown)

    return allowed
