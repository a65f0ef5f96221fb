"""The table of training situations: what each way of running a chain of couplings does in each.

Plain autograd is the oracle; `torch.utils.checkpoint`, per layer, runs along as the yardstick. Where a way does
something other than plain code does, `OTHERWISE` says so, and the test fails when that no longer holds.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from situations import ROUNDED, SITUATIONS, Report
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError
from ways import BUILD, WAYS, Build

from revfx import NotReversibleError
from revfx.capture import plan as plans
from revfx.converted import Reversible, conversion_of
from revfx.eager import block
from revfx.eager.calls import Call
from revfx.eager.executor import RegionRun, run_region
from revfx.eager.region_plan import RegionPlan
from revfx.errors import RevfxWarning


importlib.import_module("situations_programs")  # fills the rest of the table


# --- the table
@dataclass(frozen=True)
class Raised:
    """An exception of this type, whose text has this in it."""

    type: type[Exception]
    text: str


WRITES = Raised(NotReversibleError, "writes to its input in place")
RECOMPUTES_OTHERWISE = Raised(CheckpointError, "recomput")
HAS_NO_HOOKS = Raised(RuntimeError, "don't yet support saved tensor hooks")
OTHERWISE: dict[tuple[str, str], set[str] | Raised] = {
    # What f does there can't be undone, and the forward says so. `convert` leaves such a layer as it is.
    ("in place on the input of f", "rev_block"): WRITES,
    ("in place on the input of f", "RevBlock"): WRITES,
    ("in place on the input of every f", "rev_block"): WRITES,
    ("in place on the input of every f", "RevBlock"): WRITES,
    # Captured by `torch.compile`, which adds up what comes to one weight from several places in another order.
    ("closures", "convert"): {ROUNDED},
    # Checkpointing updates what f writes a second time ...
    ("batch norm", "checkpoint"): {"buffers"},
    ("batch norm without momentum over two steps", "checkpoint"): {"buffers"},
    ("double backward", "checkpoint"): {"buffers"},
    ("retain graph and two backwards", "checkpoint"): {"buffers"},
    ("anomaly mode", "checkpoint"): {"buffers"},
    ("no grad", "checkpoint"): {"buffers"},
    ("train and eval in turn", "checkpoint"): {"outputs", "gradients", "buffers"},
    ("a part in eval", "checkpoint"): {"buffers"},
    ("inputs without gradient", "checkpoint"): {"buffers"},
    ("f raises in the forward", "checkpoint"): {"buffers"},
    ("one module in all layers", "checkpoint"): {"buffers"},
    ("called twice before one backward", "checkpoint"): {"buffers"},
    ("called on its own result", "checkpoint"): {"buffers"},
    ("backwards in either order", "checkpoint"): {"buffers"},
    ("accumulation over micro batches", "checkpoint"): {"buffers"},
    ("copies by deepcopy", "checkpoint"): {"buffers"},
    ("copies by pickle", "checkpoint"): {"buffers"},
    ("copies by torch.save", "checkpoint"): {"buffers"},
    ("a state dict loaded", "checkpoint"): {"buffers"},
    # ... runs f on what it holds in the backward, silently where the shapes agree ...
    ("spectral norm", "checkpoint"): {"gradients", "buffers"},
    ("functional call and a backward after it", "checkpoint"): {"gradients"},
    ("numbers that f reads change before the backward", "checkpoint"): {"gradients", "seen"},
    ("a closure written before the backward", "checkpoint"): {"seen"},
    ("a backward in eval", "checkpoint"): RECOMPUTES_OTHERWISE,
    ("a forward in eval and a backward in train", "checkpoint"): RECOMPUTES_OTHERWISE,
    ("f leaves its result as an attribute", "checkpoint"): RECOMPUTES_OTHERWISE,
    ("in place on the input of f", "checkpoint"): Raised(RuntimeError, "modified by an inplace operation"),
    ("in place on the input of every f", "checkpoint"): Raised(RuntimeError, "modified by an inplace operation"),
    # ... and needs hooks that torch.func does not have.
    ("grad of functional call", "checkpoint"): HAS_NO_HOOKS,
    ("vmap of grad of functional call", "checkpoint"): HAS_NO_HOOKS,
}

# `convert` finds no region and says why.
REFUSED = {
    "closures": "neither an argument nor a parameter",
    "batch norm without momentum over two steps": "depends on the values of a tensor",
}
# Nothing is kept for a backward there, or hooks on saved tensors are not supported.
RUN_PLAINLY = {"grad of functional call", "vmap of grad of functional call"}


pytestmark = pytest.mark.usefixtures("fp64")


def report_of(name: str, build: Build) -> Report:
    torch.manual_seed(0)
    return SITUATIONS[name](build)


def test_every_row_of_the_tables_is_a_situation() -> None:
    assert {name for name, _ in OTHERWISE} | {*REFUSED} | RUN_PLAINLY <= {*SITUATIONS}
    assert {way for _, way in OTHERWISE} <= {*WAYS}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", SITUATIONS)
def test_a_way_does_what_plain_code_does_or_what_the_table_says(
    name: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = report_of(name, BUILD["plain"])
    runs: list[RegionRun] = []
    built: list[nn.Module] = []

    def noted(plan: RegionPlan, calls: Sequence[Call], env: dict[int, Tensor]) -> None:
        runs.append(run_region(plan, calls, env))

    for module in (block, plans):
        monkeypatch.setattr(module, "run_region", noted)

    def build(f: Any, g: Any) -> nn.Module:
        built.append(BUILD[way](f, g))
        return built[-1]

    refused = REFUSED.get(name) if way == "convert" else None
    otherwise = OTHERWISE.get((name, way), set[str]())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if isinstance(otherwise, Raised):
            with pytest.raises(otherwise.type, match=otherwise.text):
                report_of(name, build)
        else:
            found = report_of(name, build).differs_in(expected)
            assert otherwise - {ROUNDED} <= found <= otherwise  # another order may give the same, by the processor
    texts = [str(w.message) for w in caught]
    assert all(issubclass(w.category, RevfxWarning) for w in caught)
    assert not texts if refused is None else any(refused in text for text in texts), texts
    regions = [plan.regions for m in built if isinstance(m, Reversible) for plan in conversion_of(m).plans]
    saves = way != "checkpoint" and refused is None and name not in RUN_PLAINLY and not isinstance(otherwise, Raised)
    assert bool(runs) == saves
    assert all(regions) and bool(regions) == (saves and way == "convert")
