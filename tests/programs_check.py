"""What random programs are checked for: whether a step leaves what plain autograd leaves, whichever way it is taken."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from programs import Couple, Program, arguments, blocked, blocked_exactly, build, written_out
from programs_parts import Raises
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from revfx.convert import Reversible, convert
from revfx.errors import RevfxError, RevfxWarning
from revfx.partitioner import reports
from revfx.testing import store_activations


TOLERANCE = 1e-9  # relative, in fp64
ULPS = 8  # parameters and inputs are changed by up to so many units in the last place, to see what rounding does
MARGIN = 1e3  # by which a gradient may be off further than that change makes it: regions have more roundings
# inductor draws as eager kernels do, and compiles fast
OPTIONS: dict[str, dict[str, Any]] = {"aot_eager": {}, "inductor": {"cpp.simdlen": 1, "fallback_random": True}}
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
    """The steps of a program, and the texts of the warnings that were given."""

    steps: list[Step]
    warned: list[warnings.WarningMessage]


@dataclass(frozen=True)
class Verdict:
    """How a program went: `same`, a refusal, something that can't be compared, or `failure` with the reason."""

    kind: str
    text: str = ""
    found: bool = False


# --- taking steps
def loss_of(outputs: Sequence[Any], used: tuple[int, ...]) -> Tensor | None:
    """A scalar that reads the outputs and saves them; None where no output needs a gradient."""
    chosen = [y for i, y in enumerate(outputs) if not used or i in used]
    parts = [y.double() for y in chosen if isinstance(y, Tensor) and y.requires_grad]
    weighted = [
        (torch.linspace(0.5, 1.5 + k, y.numel(), dtype=y.dtype).view(y.shape) * y).sum() + y.sin().sum()
        for k, y in enumerate(parts)
    ]
    return torch.stack(weighted).sum() if weighted else None


def run(program: Program, model: nn.Module, call: Call, perturb: int = 0) -> Run:
    """The program's steps by `call`, which runs `model`'s forward; `perturb` changes the numbers a little."""
    taken: list[Step] = []
    with warnings.catch_warnings(record=True) as warned, torch.random.fork_rng():
        warnings.simplefilter("always")
        torch.manual_seed(program.seed)
        if perturb:
            _perturb([p.data for p in model.parameters()], perturb)
        for number in range(3 if program.way == "raises" else 2):
            for m in model.modules():
                if isinstance(m, Raises):
                    m.armed = program.way == "raises" and number == 1
            taken.append(_step(program, model, call, number, perturb))
            if program.way != "accumulated":
                model.zero_grad()
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(0.9)
    return Run(taken, warned)


def _perturb(tensors: Sequence[Tensor], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for t in tensors:
        if t.is_floating_point():
            ulps = float(torch.rand((), generator=generator, dtype=torch.float64) - 0.5) * 2 * ULPS
            t.mul_(1 + ulps * torch.finfo(torch.float64).eps)


def _step(program: Program, model: nn.Module, call: Call, number: int, perturb: int) -> Step:
    step = Step()
    leaves = list[Tensor]()
    try:
        losses: list[Tensor | None] = []
        for more in range(2 if program.way == "two calls" else 1):
            mine, given = arguments(program, 10 * number + more)
            if perturb:
                with torch.no_grad():
                    _perturb([*mine, *(t for t in given if not t.requires_grad)], perturb)
            leaves += mine
            outputs = pytree.tree_leaves(call(*given))
            step.outputs += [y.detach().clone() if isinstance(y, Tensor) else y for y in outputs]
            step.outputs += [y.requires_grad for y in outputs if isinstance(y, Tensor)]
            losses.append(loss_of(outputs, program.used))
            step.state += [t.detach().clone() for t in given]
        torch.rand(3)  # the backward must not depend on where the generator is then
        step.backward = True
        _backward(program.way, [x for x in losses if x is not None], [*leaves, *model.parameters()])
        step.backward = False
    except Exception as e:
        step.error = e
    step.gradients = [None if t.grad is None else t.grad.clone() for t in (*leaves, *model.parameters())]
    step.state += [*(b.clone() for b in model.buffers()), torch.get_rng_state()]
    return step


def _backward(way: str, losses: list[Tensor], wanted: list[Tensor]) -> None:
    if not losses:
        return
    loss = torch.stack(losses).sum()
    if way == "twice differentiated":
        wanted = [t for t in wanted if t.requires_grad]
        first = torch.autograd.grad(loss, wanted, create_graph=True, allow_unused=True)
        loss = loss + sum(g.square().sum() for g in first if g is not None and g.requires_grad)
    if way == "retained":
        loss.backward(retain_graph=True)
    loss.backward()


# --- comparing
def error_between(got: Sequence[Tensor | None], want: Sequence[Tensor | None]) -> float:
    """The largest relative error; a gradient under 1e-6 of the largest one's norm is measured against that."""
    pairs = [(g.double(), w.double()) for g, w in zip(got, want, strict=True) if g is not None and w is not None]
    norms = [float(w.norm()) for _, w in pairs]
    floor = 1e-6 * max(norms, default=0.0) or 1.0
    errors = [float((g - w).norm()) / max(n, floor) for (g, w), n in zip(pairs, norms, strict=True)]
    return max((e if e == e else float("inf") for e in errors), default=0.0)


def alike(a: Any, b: Any) -> bool:
    """Whether two outputs or states are the same, bit for bit."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is type(b) and a == b
    return (a.shape, a.dtype) == (b.shape, b.dtype) and torch.equal(a.nan_to_num(), b.nan_to_num())


def close(a: Any, b: Any) -> bool:
    """Whether two outputs or states are the same up to rounding."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or not b.is_floating_point():
        return alike(a, b)
    return (a.shape, a.dtype) == (b.shape, b.dtype) and error_between([a], [b]) <= 1e3 * torch.finfo(a.dtype).eps


def finite(step: Step) -> bool:
    """Whether a step's outputs and gradients are all finite numbers."""
    tensors = [t for t in (*step.outputs, *step.gradients) if isinstance(t, Tensor)]
    return all(bool(t.isfinite().all()) for t in tensors)


def compare(
    got: Run, want: Run, allowed: Callable[[int], float], exactly: bool = True, tolerance: float = TOLERANCE
) -> Verdict:
    """The verdict on `got`, given what plain autograd does.

    Gradients may be off by `tolerance`, and by what `allowed` says of a step; outputs are the same bit for bit where
    `exactly`.
    """
    drifted = any("is off by" in str(w.message) for w in got.warned if issubclass(w.category, RevfxWarning))
    for number, (g, w) in enumerate(zip(got.steps, want.steps, strict=True)):
        at = f"step {number}: "
        if w.error is not None:
            if w.backward:
                return Verdict("plain raises")
            if documented(g.error):
                return Verdict(refusal(g.error))
            if type(g.error) is not type(w.error) or str(g.error) != str(w.error):
                return Verdict("failure", f"{at}raised {g.error!r} where plain raises {w.error!r}")
            if len(g.state) != len(w.state) or not all(map(alike, g.state, w.state)):
                return Verdict("failure", f"{at}another state after an exception")
            continue
        if g.error is not None:
            if documented(g.error):
                return Verdict(refusal(g.error))
            return Verdict("failure", f"{at}raised {type(g.error).__name__}: {g.error}")
        if not finite(w):
            return Verdict("not finite")
        same = alike if exactly else close
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
        if error > tolerance and not drifted and error > allowed(number):
            return Verdict("failure", f"{at}a gradient is off by {error:.1e}")
    theirs = {str(w.message) for w in want.warned}
    for w in got.warned:
        if not issubclass(w.category, RevfxWarning) and str(w.message) not in theirs:
            return Verdict("failure", f"another warning: {w.message}")
    return Verdict("drift was warned of" if drifted else "same")


def documented(error: Exception | None) -> bool:
    """Whether an error is one that revfx promises in place of a wrong gradient."""
    texts = ("revfx: ", "`f` of layer ", "`g` of layer ")  # of a compiled graph; of `rev_block`, a ValueError
    return isinstance(error, RevfxError) or (error is not None and str(error).startswith(texts))


def refusal(error: Exception | None) -> str:
    """The kind of refusal that a documented error is: its class, and its text without names and numbers."""
    words = re.sub(r"`[^`]*`|<[^>]*>|[\d().,:]+", "", str(error)).split()
    return f"raised {type(error).__name__}: {' '.join(words[:7])}"


def conditioning(program: Program, want: Run) -> Callable[[int], float]:
    """By step, how far gradients may be off: what a change by a few units in the last place does to plain autograd's."""
    runs: list[Run] = []

    def allowed(number: int) -> float:
        if not runs:
            for seed in range(1, 5):
                model = build(program)
                runs.append(run(program, model, model, perturb=seed))
        errors = [error_between(r.steps[number].gradients, want.steps[number].gradients) for r in runs]
        return MARGIN * max(errors)

    return allowed


# --- ways
def by_convert(program: Program, couple: Couple = written_out, **options: Any) -> Verdict:
    """`convert` against the plain model."""
    plain, model = build(program), build(program, couple)
    want = run(program, plain, plain)
    converted: Any = convert(model, **options)
    got = run(program, model, converted)
    verdict, info = compare(got, want, conditioning(program, want)), converted.revfx
    if verdict.kind == "failure" and info.compiled_tried and by_stock(program, "aot_eager").kind == "failure":
        verdict = Verdict("stock differs", verdict.text)
    text = verdict.text or ("compiled; " * info.compiled_tried + "; ".join(r.reason for r in info.refusals))
    return Verdict(verdict.kind, text, found_in(converted))


def by_convert_exactly(program: Program) -> Verdict:
    """`convert(exact=True)` against the same forward with ordinary storage: gradients are equal, bit for bit."""
    stored, model = build(program), build(program)
    converted: Any = convert(stored, exact=True, capture="fx")

    def call(*args: Any) -> Any:
        with store_activations():
            return converted(*args)

    want = run(program, stored, call)
    rounded: Any = convert(model, exact=True, capture="fx")
    verdict = compare(run(program, model, rounded), want, lambda step: 0.0, tolerance=0.0)
    return Verdict(verdict.kind, verdict.text, found_in(rounded))


def by_rev_block(program: Program) -> Verdict:
    """`rev_block` where the plain model writes its couplings out."""
    plain, model = build(program), build(program, blocked)
    want = run(program, plain, plain)
    verdict = compare(run(program, model, model), want, conditioning(program, want))
    return Verdict(verdict.kind, verdict.text, True)


def by_rev_block_exactly(program: Program) -> Verdict:
    """`rev_block(exact=True)` against the same with ordinary storage."""
    stored, model = build(program, blocked_exactly), build(program, blocked_exactly)

    def call(*args: Any) -> Any:
        with store_activations():
            return stored(*args)

    want = run(program, stored, call)
    verdict = compare(run(program, model, model), want, lambda step: 0.0, tolerance=0.0)
    return Verdict(verdict.kind, verdict.text, True)


def by_backend(program: Program, inner: str = "aot_eager") -> Verdict:
    """`torch.compile(model, backend="revfx")` against the plain model; where it differs, against the same compiler
    without revfx.
    """
    with reports() as found:
        verdict = _compiled(program, "revfx", {"inner": inner, **OPTIONS[inner]})
    if verdict.kind == "failure" and by_stock(program, inner).kind == "failure":
        verdict = Verdict("stock differs", verdict.text)
    return Verdict(verdict.kind, verdict.text, any(r.regions for r in found))


def by_stock(program: Program, inner: str) -> Verdict:
    """`torch.compile` without revfx against the plain model."""
    return _compiled(program, inner, OPTIONS[inner] or None)


def _compiled(program: Program, backend: str, options: dict[str, Any] | None) -> Verdict:
    plain, model = build(program), build(program)
    want = run(program, plain, plain)
    torch.compiler.reset()
    got = run(program, model, torch.compile(model, backend=backend, options=options))
    torch.compiler.reset()
    return compare(got, want, conditioning(program, want), exactly="cpp.simdlen" not in (options or {}))


def found_in(converted: Any) -> bool:
    """Whether a converted model has a region."""
    info = converted.revfx
    inner = any(found_in(m) for m in converted.modules() if m is not converted and isinstance(m, Reversible))
    return inner or any(p.regions for p in info.plans) or (info.compiled is not None and info.compiled.found)
