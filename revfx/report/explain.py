"""`explain`: what revfx finds in a model, what that saves and what it costs, before anything is trained."""

from __future__ import annotations

import copy
import functools
import logging
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from revfx import _fake
from revfx.arguments import normalize_arguments
from revfx.capture.guards import name_of
from revfx.capture.plan import Plan
from revfx.capture.search import make_plan
from revfx.codes import TYPICAL, USUAL
from revfx.conversion import Options
from revfx.convert import convert
from revfx.converted import Reversible, conversion_of, unconverted
from revfx.eager.regeneration import Regeneration
from revfx.eager.region_plan import RegionPlan
from revfx.errors import FOR_ANY_MODEL, RevfxError
from revfx.fit.budget import Budget, checked_memory
from revfx.inspection import is_floating
from revfx.report.data import RegionInfo, Usage
from revfx.report.describe import describe, describe_recorded, types_of
from revfx.report.explanation import Explanation
from revfx.report.fit import explain_fit
from revfx.report.simulate import Loss, measured, simulate_step
from revfx.world import World


_log = logging.getLogger("revfx.report")


def explain(
    model: nn.Module,
    args: Any,
    kwargs: Mapping[str, Any] | None = None,
    *,
    memory: float | str | None = None,
    backend: str | None = None,
    measure: bool = False,
    loss: Loss | None = None,
) -> Explanation:
    """Explain the regions and refusals of `model(*args, **kwargs)`, and the memory and FLOPs of a training step.

    The step runs on fake tensors: nothing is computed or allocated, and the model stays as it is. A model that does not
    fit into memory can be explained on the "meta" device, or with smaller arguments. Workspace that kernels allocate
    within themselves is not counted.

    Args:
        model: a plain model (what would `convert` do?) or a converted one (with its own options).
        args: example inputs: a tensor, or a tuple of positional arguments.
        kwargs: keyword arguments of the model.
        memory: a budget, as for `convert`. The explanation then has the plan for it by module, the peak, the tensors
            that hold it, and the cost of other budgets. The operators of the model run once or twice for that.
        backend: "revfx" explains each graph of `torch.compile(model, backend="revfx")`; the model is captured by one
            real forward, on a copy.
        measure: also train a few real steps, on a copy of the model, and measure memory and time.
        loss: from the model's output to a scalar; default the sum of all its floating-point tensors.

    Raises:
        TypeError: `model` is not a module, or `args` is neither a tensor nor a tuple.
        ValueError: an unknown `backend`, a `memory` that is not a budget, or both given.
        Exception: any error of the model for these arguments; on fake tensors, unless `measure` is set, and unless it
            asks for a value that fake tensors lack.
    """
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"`explain` takes an nn.Module, not a {type(model).__name__}; wrap the function in a module.")
    if backend not in (None, "revfx"):
        raise ValueError(f"`backend={backend!r}` is not known; use 'revfx', or leave it out.")
    if backend is not None and memory is not None:
        raise ValueError(f"`memory={memory!r}`: the backend has no budgets. Leave `memory` or `backend` out.")
    given, named = normalize_arguments(args, kwargs)
    loss = loss or total
    if backend is not None:
        from revfx.report.compiled import explain_compiled

        return explain_compiled(model, given, named, loss, measure)
    budget = checked_memory(memory)
    own = conversion_of(model) if isinstance(model, Reversible) else None
    options = Options() if own is None else own.options
    forward = model.forward if own is None else own.forward(model)
    _log.info("looking for regions")
    outcome = make_plan(model, forward, given, named, options.exact)
    ways, regions, notes = _predicted(World(model, given, named), forward, outcome.plan, loss, measure)
    not_compiled = dict.fromkeys(() if own is None else own.not_compiled)
    if measure:
        ways = _measure(model, options, given, named, loss, ways, budget)
    fit, advice = (None, []) if budget is None else explain_fit(unconverted(model), given, named, budget)
    peaks = [u.peak or 0 for u in ways if u.way in ("plain", "revfx")]
    if regions and len(peaks) == 2 and peaks[1] > 0.8 * peaks[0]:
        advice.append("most of the peak lies outside the regions: a larger batch, or more depth, is where they save.")
    if not regions and budget is None and not any("memory=" in r.kind.remedy for r in outcome.refusals):
        advice.append(f"to train in less memory all the same, {FOR_ANY_MODEL}.")
    return Explanation(
        model=name_of(model), inputs=types_of((given, named)), regions=regions,
        refusals=(*outcome.refusals, *not_compiled), ways=ways, notes=notes,
        advice=tuple(advice), fit=fit,
    )  # fmt: skip


def total(output: Any) -> Tensor:
    """Return the sum of all floating-point tensors of a model's output."""
    sums = [t.sum() for t in pytree.tree_leaves(output) if is_floating(t) and t.requires_grad]
    if not sums:
        raise RevfxError(
            "no output of the model needs a gradient, so there is no training step to explain. Let parameters or inputs"
            " require gradients."
        )
    return functools.reduce(torch.add, sums)


# --- predicted
def _predicted(
    world: World, forward: Callable[..., Any], plan: Plan | None, loss: Loss, measure: bool
) -> tuple[tuple[Usage, ...], tuple[RegionInfo, ...], tuple[str, ...]]:
    """Return the usage of a plain step and of one with regions, the regions, and notes."""
    try:
        _log.info("counting a plain step")
        plain = simulate_step(world, forward, loss)
    except Exception as e:
        if not (measure or isinstance(e, (*_fake.DATA_DEPENDENT, _fake.NO_FAKE))):
            raise
        regions = () if plan is None else tuple(_unrun(plan, r) for r in plan.regions.values())
        note = f"no prediction: on fake tensors the model raises {type(e).__name__}; use `measure=True`."
        return (), regions, (note,)
    if plan is None:
        return (plain,), (), ()
    regions = list[RegionInfo]()
    _log.info("counting a step with regions")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a run that does not take place
        ours = simulate_step(
            world,
            lambda *args, **kwargs: plan.run(pytree.tree_leaves((args, kwargs))),
            loss,
            lambda run: regions.append(_described(plan, run)),
        )
    return (plain, ours), tuple(regions), ()


def _described(plan: Plan, run: Regeneration) -> RegionInfo:
    """Describe a region that was run, of the plan itself or of a `RevBlock` inside a module that is called whole."""
    kept, codes = frozenset(run.kept_cuts), None
    if run.lossless:
        codes = sum(code.nbytes for code in run.codes.values())
    uncoded = frozenset[int]().union(*run.uncoded.values())
    if run.program is plan.lowered.program:
        return describe_recorded(plan, run.region, kept, uncoded, codes)
    names = {i: c.name for i, c in enumerate(run.calls)}
    return describe(run.program, run.region, kept, names, "rev_block", uncoded, codes)


def _unrun(plan: Plan, planned: RegionPlan) -> RegionInfo:
    """Describe a region of a model that can't be run on fake tensors, with codes as large as such are wont to be."""
    region, values = planned.region, plan.lowered.program.values
    coded = sum(math.prod(values[v].shape) for v in planned.codecs)
    codes = int(coded * (TYPICAL / 8 + 6 * USUAL)) if planned.lossless else None
    return describe_recorded(plan, region, (0, len(region.steps)), (), codes)


# --- measured
def _measure(
    model: nn.Module, options: Options, args: Any, kwargs: Any, loss: Loss, ways: Sequence[Usage], budget: Budget | None
) -> tuple[Usage, ...]:
    """Return the ways with their measured memory and time."""
    own = unconverted(copy.deepcopy(model))
    models = {"plain": own, "revfx": convert(own, exact=options.exact)}
    if budget is not None:
        models["fitted"] = convert(own, memory=budget)
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        _log.info("measuring")
        return measured(models, args, kwargs, loss, ways)
