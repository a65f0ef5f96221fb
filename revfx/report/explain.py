"""`explain`: the findings of revfx in a model, their memory and cost, before anything is trained."""

from __future__ import annotations

import copy
import functools
import itertools
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from revfx import _fake
from revfx.arguments import normalize_arguments
from revfx.conversion import Options
from revfx.converted import Reversible, conversion_of, unconverted
from revfx.converting import convert
from revfx.errors import FOR_ANY_MODEL, Refusal, RevfxError, name_of
from revfx.fit.budget import Budget, checked_memory
from revfx.inspection import is_floating
from revfx.plan.model import PlannedModel
from revfx.plan.simulated import SimulatedModel
from revfx.report.data import RegionInfo, Usage
from revfx.report.describe import describe, types_of
from revfx.report.explanation import Explanation
from revfx.report.fit import explain_fit
from revfx.report.simulate import Loss, measure_steps, simulate_step
from revfx.world.fake import FakeWorld


_log = logging.getLogger("revfx.report")


def explain(
    model: nn.Module,
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    memory: float | str | None = None,
    backend: str | None = None,
    measure: bool = False,
    loss: Loss | None = None,
) -> Explanation:
    """Explain the regions and refusals of `model(*args, **kwargs)`, and the memory and FLOPs of a training step.

    The step runs on fake tensors: nothing is computed or allocated, and the model stays as it is. A model that does not
    fit into memory can be explained on the "meta" device, or with smaller arguments. The workspace of kernels is
    counted only if it is known.

    Args:
        model: a plain model, explained as `convert` would run it, or a converted one, with its own options.
        args: example inputs: a tensor, or a tuple of positional arguments.
        kwargs: keyword arguments of the model.
        memory: a budget, as for `convert`. The explanation then has the plan for it by module, the peak, the tensors
            that hold it, and the cost of other budgets. The operators of the model run once or twice for that.
        backend: "revfx" explains each graph of `torch.compile(model, backend="revfx")`. A copy of the model runs one
            real forward.
        measure: also train a few real steps, on a copy of the model, and measure memory and time.
        loss: from the model's output to a scalar; default the sum of all its floating-point tensors.

    Raises:
        TypeError: `model` is not a module, or `args` is neither a tensor nor a tuple.
        ValueError: an unknown `backend`, a `memory` that is not a budget, or both given.
        Exception: an error of the model for these arguments on fake tensors. With `measure`, or if it asks for an
            element that fake tensors lack, the explanation has no prediction instead.
    """
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"`explain` takes an nn.Module, not a {type(model).__name__}; wrap the function in a module.")
    if backend not in (None, "revfx"):
        raise ValueError(f"`backend={backend!r}` is not known; use 'revfx', or leave it out.")
    if backend is not None and memory is not None:
        raise ValueError(f"`memory={memory!r}`: the backend has no budgets. Leave `memory` or `backend` out.")
    arguments, keywords = normalize_arguments(args, kwargs)
    loss = loss or total
    if backend is not None:
        from revfx.report.compiled import explain_compiled

        return explain_compiled(model, arguments, keywords, loss, measure)

    # Predict a plain step and one of `convert`, on fake tensors, and measure real ones.
    budget = checked_memory(memory)
    forward, options, conversion = model.forward, Options(), None
    if isinstance(model, Reversible):
        conversion = conversion_of(model)
        forward, options = conversion.forward(model), conversion.options
    found = _predict(FakeWorld(model, arguments, keywords, whole=True), forward, options.exact, loss, measure)
    not_compiled = [] if conversion is None else conversion.not_compiled
    ways = found.ways
    if measure:
        ways, planned = _measure(model, options, arguments, keywords, loss, ways, budget)
        if not found.ways:
            found = found._replace(regions=_describe_regions(planned, {0: planned.coded_bytes}))

    # The planner knows the workspace of kernels, so that its predictions replace the others.
    fit, advice = None, list[str]()
    if budget is not None:
        planned_step = explain_fit(unconverted(model), arguments, keywords, budget)
        fit, advice, ways = planned_step.fit, planned_step.advice, _replace_predictions(ways, planned_step.ways)

    peaks = {u.way: u.peak or 0 for u in ways}
    if found.regions and {"plain", "revfx"} <= peaks.keys() and peaks["revfx"] > 0.8 * peaks["plain"]:
        advice.append("most of the peak lies outside the regions: a larger batch, or more depth, is where they save.")
    if not found.regions and budget is None and not any("memory=" in r.kind.remedy for r in found.refusals):
        advice.append(f"to train in less memory all the same, {FOR_ANY_MODEL}.")
    return Explanation(
        model=name_of(model),
        inputs=types_of((arguments, keywords)),
        regions=found.regions,
        refusals=(*found.refusals, *dict.fromkeys(not_compiled)),
        ways=ways,
        notes=found.notes,
        advice=tuple(advice),
        fit=fit,
    )


def _replace_predictions(ways: Sequence[Usage], predicted: Sequence[Usage]) -> tuple[Usage, ...]:
    """Return the usage of steps, with the memory of others in the place of their own."""
    known = {u.way: u for u in ways}
    for u in predicted:
        known[u.way] = replace(known.get(u.way, u), peak=u.peak, live=u.live, backward=u.backward)
    return tuple(known.values())


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
class Prediction(NamedTuple):
    """The usage of steps, the regions, the places that are left as they are, and notes."""

    ways: tuple[Usage, ...]
    regions: tuple[RegionInfo, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    notes: tuple[str, ...] = ()


def _predict(world: FakeWorld, forward: Callable[..., Any], lossless: bool, loss: Loss, measure: bool) -> Prediction:
    """Count a plain step, and a step that drops the activations of regions.

    Args:
        world: the model and its arguments.
        forward: the model's own forward.
        lossless: inverses that round get codes.
        loss: from the model's output to a scalar.
        measure: real steps are measured too, so that an error on fake tensors is only noted.
    """
    try:
        _log.info("counting a plain step")
        plain = simulate_step(world, forward, loss)
    except Exception as e:
        if not (measure or isinstance(e, (*_fake.DATA_DEPENDENT, _fake.NO_FAKE))):
            raise
        message = str(e).strip().partition("\n")[0]
        note = f"no prediction: on fake tensors the model raises {type(e).__name__} ({message}); use `measure=True`."
        return Prediction((), notes=(note,))
    _log.info("looking for regions, and counting a step with them")
    planned = SimulatedModel(lossless, world.real_of)
    run = functools.partial(planned.call, world.model, forward)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a run that does not take place
        codes: dict[int, int] = {}
        ours = simulate_step(world, lambda *args, **kwargs: run(args, kwargs), loss, codes)
    regions = _describe_regions(planned, codes)
    return Prediction((plain, ours) if regions else (plain,), regions, tuple(planned.refusals))


def _describe_regions(planned: PlannedModel, codes: Mapping[int, int]) -> tuple[RegionInfo, ...]:
    """Describe the regions of the latest kind of calls; `codes`: the bytes of codes by the position of their unit."""
    kind = [*planned.kinds.values()][-1]
    if not kind.units:
        return ()
    found, program = kind.found, kind.found.lowered.program
    infos: list[RegionInfo] = []
    for number, region in enumerate(found.regions):
        paths: list[list[str]] = []
        names: dict[int, str] = {}
        for i in range(region.start, region.stop):
            paths.append(found.op(i).module.split("."))
            names[i] = ".".join(filter(None, (*paths[-1], program.ops[i].name)))
        levels = itertools.takewhile(lambda level: len(set(level)) == 1, zip(*paths, strict=False))
        module = ".".join(level[0] for level in levels)
        code_bytes = None
        if planned.lossless:
            code_bytes = sum(nbytes for site, nbytes in codes.items() if kind.plan.path.chain(site) == number)
        infos.append(describe(program, region, (0, len(region.steps)), names, module, code_bytes))
    return tuple(infos)


# --- measured
def _measure(
    model: nn.Module, options: Options, args: Any, kwargs: Any, loss: Loss, ways: Sequence[Usage], budget: Budget | None
) -> tuple[tuple[Usage, ...], PlannedModel]:
    """Return the usage of steps with their measured memory and time, and the plans of the converted model."""
    own = unconverted(copy.deepcopy(model))
    converted = convert(own, exact=options.exact)
    models = {"plain": own, "revfx": converted}
    if budget is not None:
        models["fitted"] = convert(own, memory=budget)
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        _log.info("measuring")
        ways = measure_steps(models, args, kwargs, loss, ways)
    planned = conversion_of(converted).planned
    assert planned is not None
    return ways, planned
