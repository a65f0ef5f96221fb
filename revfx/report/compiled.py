"""`explain(model, ..., backend="revfx")`: the regions of each graph that `torch.compile` makes, and why graphs end."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import nn

from revfx.compiled import _inductor, partitioner
from revfx.compiled.functions import with_own_code
from revfx.converted import unconverted
from revfx.errors import name_of
from revfx.report.data import Usage, short
from revfx.report.describe import describe, types_of
from revfx.report.explanation import Explanation
from revfx.report.simulate import Loss, measured


def explain_compiled(model: nn.Module, args: Any, kwargs: Any, loss: Loss, measure: bool) -> Explanation:
    """Explain each graph of `model(*args, **kwargs)` under the backend; a copy of the model runs forwards once.

    With `measure` a few steps are trained too, eagerly, under inductor, and under inductor with revfx.
    """
    own = unconverted(copy.deepcopy(model))
    ways: tuple[Usage, ...] = ()
    with torch.enable_grad(), torch.random.fork_rng(), warnings.catch_warnings(), _inductor.capturing():
        warnings.simplefilter("ignore")  # of the compiler
        with _inductor.graph_breaks() as breaks, partitioner.reports() as reports:
            torch.compile(with_own_code(own), backend="revfx", options={"inner": "aot_eager"})(*args, **kwargs)
        if measure:
            inductor, backend = torch.compile(with_own_code(own)), torch.compile(with_own_code(own), backend="revfx")
            ways = measured({"plain": own, "inductor": inductor, "revfx": backend}, args, kwargs, loss)
    graphs = tuple(tuple(describe(*d, {}, "") for d in report.details) for report in reports)
    return Explanation(
        model=name_of(model), inputs=types_of((args, kwargs)),
        regions=tuple(r for graph in graphs for r in graph),
        refusals=tuple(dict.fromkeys(r for report in reports for r in report.refusals)),
        ways=ways,
        graphs=graphs, breaks=tuple(dict.fromkeys(f"{short(place)}: {reason}" for reason, place in breaks)),
        notes=() if reports else ("`torch.compile` made no graph that has a gradient.",),
    )  # fmt: skip
