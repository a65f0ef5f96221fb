"""Checkpoints by `torch.distributed.checkpoint`, between plain and converted models, whole and sharded.

In a module of its own, which the spawned processes can import.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from distributed_models import Result, chain, inputs, train
from helpers import loss_of
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.fsdp import fully_shard
from ways import Build, Plain, functions_of


Place = Callable[[nn.Module], nn.Module]


def whole(model: nn.Module) -> nn.Module:
    return model


def sharded(model: nn.Module) -> nn.Module:
    for m in functions_of(model):
        fully_shard(m)
    fully_shard(model)
    return model


def moved(place: Place, back: bool) -> Callable[[Build, int, int], Result]:
    """A model in one place and form is trained for a step, saved, loaded into one of the other, and trained on.

    There: from the built and placed model to a plain, whole one; `back`: from that to the built and placed one. What
    the second gives then has to be what the first would have given; the gradients are those of both, in turn.
    """

    def run(build: Build, rank: int, world: int) -> Result:
        models = [place(chain(build)), chain(Plain)]
        first, second = reversed(models) if back else models
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9, foreach=False) for m in (first, second)]
        with torch.no_grad():
            for p in second.parameters():
                p.zero_()
        loss_of(first(inputs(0, 9))).backward()
        optimizers[0].step()
        optimizers[0].zero_grad()
        folder = [tempfile.mkdtemp()] if rank == 0 else [""]
        dist.broadcast_object_list(folder)
        save(_state(first, optimizers[0]), checkpoint_id=folder[0])
        state = _state(second, optimizers[1])
        load(state, checkpoint_id=folder[0])
        set_state_dict(second, optimizers[1], model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        results: list[Result] = []
        for model, optimizer in zip((first, second), optimizers, strict=True):
            loss_of(model(inputs(0, 8))).backward()
            optimizer.step()
            optimizer.zero_grad()
            results.append(train(model, 0))
        gradients = [g for pair in zip(*(r.gradients for r in results), strict=True) for g in pair]
        return Result(gradients, results[1].buffers)

    return run


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    state, of_optimizer = get_state_dict(model, optimizer)
    return {"model": state, "optimizer": of_optimizer}


STATE = {
    "to plain": moved(whole, back=False),
    "from plain": moved(whole, back=True),
    "sharded, to plain": moved(sharded, back=False),
    "sharded, from plain": moved(sharded, back=True),
}
