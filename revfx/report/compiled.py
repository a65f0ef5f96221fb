"""`explain(model, ..., backend="revfx")`: the regions of each graph that `torch.compile` makes, and why graphs end."""

from __future__ import annotations

import copy
import itertools
import warnings
from typing import Any

import torch
from torch import nn

from revfx.compiled import _inductor, partitioner
from revfx.compiled.functions import with_own_code
from revfx.converted import unconverted
from revfx.errors import Refusal, name_of
from revfx.report.data import RegionInfo, Usage, place_name
from revfx.report.describe import describe, types_of
from revfx.report.explanation import Explanation
from revfx.report.simulate import Loss, measure_steps


def explain_compiled(model: nn.Module, args: Any, kwargs: Any, loss: Loss, measure: bool) -> Explanation:
    """Explain each graph of `model(*args, **kwargs)` under the backend; a copy of the model runs one forward.

    `measure`: also train a few steps, eagerly, under inductor, and under inductor with revfx.
    """
    own = unconverted(copy.deepcopy(model))
    ways: tuple[Usage, ...] = ()
    notes: tuple[str, ...] = ()
    with torch.enable_grad(), torch.random.fork_rng(), warnings.catch_warnings(), _inductor.capturing():
        warnings.simplefilter("ignore")  # of the compiler
        with _inductor.graph_breaks() as breaks, partitioner.reports() as reports:
            torch.compile(with_own_code(own), backend="revfx", options={"inner": "aot_eager"})(*args, **kwargs)
        if measure:
            inductor, backend = torch.compile(with_own_code(own)), torch.compile(with_own_code(own), backend="revfx")
            ways = measure_steps({"plain": own, "inductor": inductor, "revfx": backend}, args, kwargs, loss)
    graphs: list[tuple[RegionInfo, ...]] = []
    refusals: dict[Refusal, None] = {}
    for report in reports:
        graphs.append(tuple(describe(*details, {}, "") for details in report.details))
        refusals.update(dict.fromkeys(report.refusals))
    if not reports:
        notes = ("`torch.compile` made no graph that has a gradient.",)
    return Explanation(
        model=name_of(model),
        inputs=types_of((args, kwargs)),
        regions=tuple(itertools.chain(*graphs)),
        refusals=tuple(refusals),
        ways=ways,
        graphs=tuple(graphs),
        breaks=tuple(dict.fromkeys(f"{place_name(place)}: {reason}" for reason, place in breaks)),
        notes=notes,
    )
