"""What `budgets.py` compares with: checkpoints of blocks, selective ones, and torch's `activation_memory_budget`."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from budget_models import Task
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts


Call = Callable[..., Any]
EVERY = (1, 2, 3)  # of so many blocks one is checkpointed
SAVED = {
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "convolution",
    "_scaled_dot_product_flash_attention_for_cpu",
    "mkldnn_rnn_layer",
}
BUDGETS = (0.05, 0.15, 0.3, 0.5, 0.7)


def _policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    saved = getattr(op, "overloadpacket", op).__name__ in SAVED
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


def _checkpointed(task: Task, model: nn.Module, every: int = 1, **options: Any) -> Call:
    """The model, of whose blocks every so many run under a checkpoint."""
    for block in task.blocks(model)[::every]:
        forward = type(block).forward

        def call(self: Any, *args: Any, forward: Any = forward, **kwargs: Any) -> Any:
            return checkpoint(forward, self, *args, use_reentrant=False, **options, **kwargs)

        block.forward = types.MethodType(call, block)
    return model


def _budgeted(budget: float, model: nn.Module) -> Call:
    """The model with torch's partitioner under a budget, over eager kernels."""
    from torch import _dynamo as dynamo
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch import config
    from torch._functorch.compilers import nop
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    def partition(*args: Any, **kwargs: Any) -> Any:
        with config.patch(activation_memory_budget=budget):
            return min_cut_rematerialization_partition(*args, **kwargs)

    dynamo.config.recompile_limit = 64
    return torch.compile(model, backend=aot_autograd(fw_compiler=nop, bw_compiler=nop, partition_fn=partition))


def rivals(task: Task, all_of_them: bool) -> Iterator[tuple[str, Callable[[nn.Module], Call]]]:
    """Names, and what makes each of the model."""
    for n in EVERY:
        yield "checkpoint" + (f" of every {n}." if n > 1 else ""), partial(_checkpointed, task, every=n)
    if all_of_them:
        context = partial(create_selective_checkpoint_contexts, _policy)
        yield "selective checkpoint", partial(_checkpointed, task, context_fn=context)
        drops = any(isinstance(m, nn.Dropout) and m.p for m in task.model.modules())
        if not drops:  # with dropout it gives wrong gradients: pytorch#190717
            for budget in BUDGETS:
                yield f"torch's budget {budget}", partial(_budgeted, budget)
