"""The ways in which a random program is taken by revfx, each against what it has to equal."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from typing import Any

import torch
from programs import Couple, Program, arguments, blocked, build, written_out
from programs_check import TOLERANCE, Verdict, compare, conditioning, nearer
from programs_steps import Run, run
from torch._dynamo import explain
from torch._functorch import config as functorch_config

from revfx.compiled.partitioner import reports
from revfx.converted import Reversible
from revfx.converting import convert


# Inductor draws as eager kernels do, and in their order: torch's chain of random operations leaves out those whose
# state is saved, and a reordering may swap them. One element at a time compiles fast.
IN_ORDER = {"fallback_random": True, "reorder_for_peak_memory": False}
# Caches of graphs are left out: a backward that is kept there is raised for where `retain_graph` is given later.
OPTIONS: dict[str, dict[str, Any]] = {
    "aot_eager": {},
    "inductor": {"cpp.simdlen": 1, "fx_graph_cache": False, **IN_ORDER},
}
# torch 2.13 crashes, with or without revfx, where the parts of a `chunk` are returned and one of them detached as well
DETACHED = re.compile(r"^k\d+ = \w+\.detach\(\)$")

NARROW = re.compile(r"single\(|\.float\(\)")


def _nothing(step: int) -> float:
    """How far a value may be off where all is as it was."""
    return 0.0


def exactly(got: Run, want: Run) -> Verdict:
    """The verdict on what has to be the same to the last bit."""
    return compare(got, want, _nothing, tolerance=0.0)


def by_convert(program: Program, couple: Couple = written_out, **options: Any) -> Verdict:
    """`convert` against the plain model."""
    plain, model = build(program), build(program, couple)
    want = run(program, plain, plain)
    converted: Any = convert(model, **options)
    verdict = exactly(run(program, model, converted), want)
    text = verdict.text or "; ".join(map(str, converted.revfx.refusals))
    return Verdict(verdict.kind, text, found_in(converted))


def by_rev_block(program: Program) -> Verdict:
    """`rev_block` where the plain model writes its couplings out."""
    plain, model = build(program), build(program, blocked)
    want = run(program, plain, plain)
    verdict = exactly(run(program, model, model), want)
    return Verdict(verdict.kind, verdict.text, True)


def by_backend(program: Program, inner: str = "aot_eager") -> Verdict:
    """`torch.compile(model, backend="revfx")` against the plain model."""
    with reports() as found:
        got, want = _compiled(program, "revfx", {"inner": inner, **OPTIONS[inner]})
    verdict = _judged(program, got, want, inner)
    # draws whose state is saved are moved where kernels are fused, and fill other layouts than eager's
    if verdict.kind == "failure" and inner == "inductor" and (draws(program) or _stock_raises(program)):
        verdict = by_backend(program, "aot_eager")
        verdict = Verdict("over eager kernels alone", verdict.text) if verdict.kind == "same" else verdict
    return Verdict(verdict.kind, verdict.text, any(r.regions for r in found))


KEPT = "has been modified by an inplace operation"
PARTS = "This view is the output of a function that returns multiple views"


def _judged(program: Program, got: Run, want: Run, inner: str | None) -> Verdict:
    """The verdict on `got`, which by eager kernels is to be the same to the last bit; where a compiler differs from
    plain also without revfx, each value may be as it is there or over its eager kernels. It may save copies, so that a
    write to something, for which plain raises, does no harm.
    """
    fused = inner == "inductor"
    allowed, eps, tolerance = (
        (conditioning(program, want), rounding(program), TOLERANCE) if fused else (_nothing, 0.0, 0.0)
    )
    verdict = theirs = compare(got, want, allowed, eps, tolerance)
    if verdict.kind == "failure" and inner is not None and program.way == "written" and want.steps[0].error is not None:
        plain = build(program)
        unwritten = run(replace(program, way="once"), plain, plain)
        if compare(Run(got.steps[:1], []), Run(unwritten.steps[:1], []), allowed, eps, tolerance).kind != "failure":
            return Verdict("right in spite of a write")
        if inner == "inductor" and PARTS in verdict.text:  # what a loss reads beside the graph: docs/limits.md
            return Verdict("part of an input returned")
    if verdict.kind == "failure" and inner is not None and KEPT in verdict.text and _writes_across_graphs(program):
        return Verdict("raised: an input that a graph keeps is written to by a later one")  # docs/limits.md
    for kernels in dict.fromkeys(("aot_eager", inner)) if inner is not None and verdict.kind == "failure" else ():
        stock, _ = _compiled(program, kernels, OPTIONS[kernels] or None)
        if compare(stock, want, allowed, eps, tolerance).kind == "failure":
            theirs = compare(got, nearer(got, want, stock), allowed, eps, tolerance)
            if theirs.kind != "failure":
                return Verdict("stock differs", verdict.text)
    return theirs


def _writes_across_graphs(program: Program) -> bool:
    """Whether the model writes to an input, and is captured in several graphs."""
    if not any(re.search(rf"\b{i.name}\.\w+_\(", program.source) for i in program.inputs):
        return False
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.compiler.reset()
        return explain(build(program))(*arguments(program, 0)[1]).graph_count > 1


def rounding(program: Program) -> float:
    """That of the dtypes which a program computes in; kernels that are fused otherwise round otherwise."""
    narrow = NARROW.search(program.source) or any(i.kind == "single" for i in program.inputs)
    return torch.finfo(torch.float32 if narrow else torch.float64).eps


def draws(program: Program) -> bool:
    """Whether the plain model draws random numbers."""
    drawn: list[bool] = []
    model = build(program)

    def call(*args: Any) -> Any:
        before = torch.get_rng_state()
        out = model(*args)
        drawn.append(not torch.equal(before, torch.get_rng_state()))
        return out

    run(program, model, call)
    return any(drawn)


def _stock_raises(program: Program) -> bool:
    """Whether inductor raises also without revfx."""
    got, _ = _compiled(program, "inductor", OPTIONS["inductor"])
    return any(step.error for step in got.steps)


def _compiled(program: Program, backend: str, options: dict[str, Any] | None) -> tuple[Run, Run]:
    """The steps of a compiled program, and those of the plain one."""
    program = replace(program, body=tuple(f"{s}.clone()" if DETACHED.match(s) else s for s in program.body))
    plain, model = build(program), build(program)
    want = run(program, plain, plain)
    torch.compiler.reset()
    with functorch_config.patch(enable_autograd_cache=False):
        got = run(program, model, torch.compile(model, backend=backend, options=options))
    torch.compiler.reset()
    return got, want


def found_in(converted: Any) -> bool:
    """Whether a converted model has a region."""
    inner = any(found_in(m) for m in converted.modules() if m is not converted and isinstance(m, Reversible))
    return inner or bool(converted.revfx.regions)
