"""The table of training situations: what each way of running a chain of couplings does in each.

Plain autograd is the oracle; `torch.utils.checkpoint`, per layer, runs along as the yardstick. Where a way does
something other than plain code does, `OTHERWISE` says so, and the test fails when that no longer holds.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from situations import SITUATIONS, Report
from torch import nn
from torch.utils.checkpoint import CheckpointError
from ways import BUILD, WAYS, Build

from revfx import block
from revfx.converted import Reversible, conversion_of
from revfx.plan.model import PlannedModel


importlib.import_module("situations_programs")  # fills the rest of the table


# --- the table
@dataclass(frozen=True)
class Raised:
    """An exception of this type, whose text has this in it."""

    type: type[Exception]
    text: str


RECOMPUTES_OTHERWISE = Raised(CheckpointError, "recomput")
HAS_NO_HOOKS = Raised(RuntimeError, "don't yet support saved tensor hooks")
OTHERWISE: dict[tuple[str, str], set[str] | Raised] = {
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

# Nothing is kept for a backward there, or hooks on saved tensors are not supported.
RUN_PLAINLY = {"grad of functional call", "vmap of grad of functional call"}


pytestmark = pytest.mark.usefixtures("fp64")


def report_of(name: str, build: Build) -> Report:
    torch.manual_seed(0)
    return SITUATIONS[name](build)


def test_every_row_of_the_tables_is_a_situation() -> None:
    assert {name for name, _ in OTHERWISE} | RUN_PLAINLY <= {*SITUATIONS}
    assert {way for _, way in OTHERWISE} <= {*WAYS}


class Plans:
    """The plans of all models of a test, so that a situation is met again by models that have learnt it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.of: dict[Any, PlannedModel] = {}
        monkeypatch.setattr(block, "_find_plans", self.of_block)

    def of_block(self, first: Any, layers: int, exact: bool) -> PlannedModel:
        return self.of.setdefault((layers, exact), PlannedModel(exact))

    def build(self, way: str, f: Any, g: Any) -> nn.Module:
        model = BUILD[way](f, g)
        if isinstance(model, Reversible):
            conversion_of(model).planned = self.of.setdefault("convert", PlannedModel())
        return model

    @property
    def matched(self) -> list[int]:
        """The units that matched in the latest call of each kind."""
        return [kind.matched for planned in self.of.values() for kind in planned.kinds.values()]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", SITUATIONS)
def test_a_way_does_what_plain_code_does_or_what_the_table_says(
    name: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first round learns, the second one proves, and the third one is steady."""
    expected, plans = report_of(name, BUILD["plain"]), Plans(monkeypatch)

    def build(f: Any, g: Any) -> nn.Module:
        return plans.build(way, f, g)

    otherwise = OTHERWISE.get((name, way), set[str]())
    for _ in range(3):
        if isinstance(otherwise, Raised):
            with pytest.raises(otherwise.type, match=otherwise.text):
                report_of(name, build)
        else:
            assert report_of(name, build).differs_in(expected) == otherwise
    assert any(plans.matched) == (way != "checkpoint" and name not in RUN_PLAINLY)
