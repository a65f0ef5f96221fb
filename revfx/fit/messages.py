"""Warnings about budgets."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Generator, Sequence

import torch
from torch import Tensor, nn

from revfx.errors import BudgetWarning, warn
from revfx.fit.budget import Budget, as_memory
from revfx.fit.planner import LOSS_RATIO
from revfx.info import BudgetPlan
from revfx.units import size


def shapes_of(tensors: Sequence[Tensor]) -> str:
    """Return shapes of tensors as text, such as "inputs (8, 512), (8, 512)"."""
    return f"inputs {', '.join(str(tuple(t.shape)) for t in tensors)}" if tensors else "no inputs"


def about_checkpoints(model: nn.Module) -> str:
    """Return a sentence for a model that checkpoints itself, as libraries mark their modules; "" for others."""
    marks = ("gradient_checkpointing", "grad_checkpointing")
    for module in model.modules():
        for mark in marks:
            if getattr(module, mark, False) is True:
                return (
                    f" The model checkpoints itself (`{type(module).__name__}.{mark}`), and the plain model's bytes are"
                    " those that it takes so. Turn that off, and the budget decides what is recomputed."
                )
    return ""


@contextlib.contextmanager
def noting_out_of_memory(plans: Callable[[], Sequence[BudgetPlan]]) -> Generator[None]:
    """Add the plans for a budget to an out-of-memory error of the device (from Python 3.11 on)."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        if sys.version_info >= (3, 11):
            text = "The model has a memory budget, beside which parameters, gradients and optimizer state are there."
            error.add_note("\n".join((text, *map(str, plans()))))
        raise


def warn_of_gathered_part(name: str, budget: Budget, part: str) -> None:
    """Warn that a model runs plainly: FSDP2 gathers the parameters of its compiled part."""
    warn(
        f"`convert({name}, {budget.text})`: FSDP2 gathers parameters, and `{part}` is compiled, which can't run again"
        " without them. The model runs plainly, and the budget is not kept. Leave the part uncompiled.",
        BudgetWarning,
    )


def warn_of_hooks() -> None:
    """Warn that a model runs plainly, as somebody else sees its operators or saved tensors."""
    warn(
        "hooks on saved tensors, such as those of a checkpoint, or dispatch modes are active around a model with a"
        " budget. It runs plainly, and the budget is not kept. Remove them, or convert the outer model that they are"
        " around.",
        BudgetWarning,
    )


def warn_of_losses(name: str, budget: Budget, most: int) -> None:
    """Warn that a budget is kept with losses alone that take little memory; a larger one takes up to `most` bytes."""
    warn(
        f"`convert({name}, {budget.text})`: the plan stays within the budget only for a loss that takes"
        f" little memory. With one that takes {LOSS_RATIO} times the outputs a step takes up to {size(most)}. Compute"
        f' the loss in the forward, or give `memory="{as_memory(most)}"`.',
        BudgetWarning,
    )


def warn_of_least(name: str, budget: Budget, inputs: str, most: int) -> None:
    """Warn that a step that came later can't stay within the budget, and takes up to `most` bytes."""
    warn(
        f"`convert({name}, {budget.text})`: no plan for {inputs} stays within the budget, which earlier calls were"
        f" planned for. A step takes up to {size(most)}. Give smaller inputs, or a larger budget.",
        BudgetWarning,
    )


def warn_of_miss(name: str, budget: Budget, over: int) -> None:
    """Warn that a step took so many bytes more than its budget."""
    warn(
        f"`convert({name}, {budget.text})`: a step took {size(over)} more than its budget, as the allocator"
        " counts. The next step is planned for that much less. Give a smaller `memory=` if the device runs out of"
        " memory.",
        BudgetWarning,
    )


def warn_of_blocks(name: str, budget: Budget) -> None:
    """Warn that there is no plan, so that whole blocks are dropped."""
    warn(
        f"`convert({name}, {budget.text})`: no plan can be made, as backwards keep their graphs (`retain_graph`,"
        " `create_graph`), or never came. Each block is recomputed whole, and the budget may be exceeded.",
        BudgetWarning,
    )


def warn_of_ways(name: str, budget: Budget) -> None:
    """Warn that a forward went a way for which there is no plan yet."""
    warn(
        f"`convert({name}, {budget.text})`: a forward ran other operators than the ones that were planned for, and may"
        " have exceeded the budget. One of the next steps is recorded, and such forwards have their own plan then.",
        BudgetWarning,
    )
