"""What torch.distributed does to what revfx looks at: DTensors, collectives under way, the casts of FSDP2.

Nothing here imports torch.distributed: what was not imported is not in use.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from revfx import _fsdp, _torch
from revfx.layout import restrided


# --- tensors
@dataclass(frozen=True, slots=True)
class Spread:
    """How a DTensor is spread over the processes, and its strides: those of the whole, and of what this one holds."""

    placements: tuple[Any, ...]
    stride: tuple[int, ...]
    held_shape: tuple[int, ...]
    held_stride: tuple[int, ...]


def spread_of(tensor: Any) -> Spread | None:
    """Return how a DTensor is spread; None for any other tensor."""
    if not _torch.is_dtensor(tensor):
        return None
    held = _held(tensor)
    return Spread(tensor.placements, tensor.stride(), tuple(held.shape), held.stride())


def spread(tensor: Any, like: Spread | None) -> Any:
    """Return `tensor`, spread as `like` says, with its strides; partial sums, which can't be, as they are."""
    if like is None:
        return tensor
    if tensor.placements != like.placements:
        if any(p.is_partial() for p in like.placements):
            return tensor
        tensor = tensor.redistribute(placements=like.placements)
    held = _held(tensor)
    if (tensor.stride(), held.stride()) == (like.stride, like.held_stride) or tuple(held.shape) != like.held_shape:
        return tensor
    return holding(tensor, restrided(held, like.held_shape, like.held_stride), like.stride)


def _held(tensor: Any) -> Tensor:
    """Return what this process holds of a DTensor, without its history."""
    with torch.no_grad():
        return tensor.to_local()


def piece(tensor: Any) -> Tensor:
    """Return what this process holds of a DTensor, and nothing of one in partial sums; any other tensor itself."""
    if not _torch.is_dtensor(tensor):
        return tensor
    local = tensor.to_local()
    return local[:0].reshape(-1) if any(p.is_partial() for p in tensor.placements) else local


def holding(tensor: Any, piece: Tensor, stride: tuple[int, ...] | None = None) -> Any:
    """Return `tensor`, a DTensor, with `piece` as what this process holds of it, and the `stride` that is given."""
    whole = {"shape": tensor.shape, "stride": tensor.stride() if stride is None else stride}
    return type(tensor).from_local(piece, tensor.device_mesh, tensor.placements, run_check=False, **whole)


def arrived(tensor: Any) -> Tensor:
    """Return `tensor`, after the collective that makes it, if one does: what nobody waits for is never freed."""
    collectives: Any = sys.modules.get("torch.distributed._functional_collectives")
    if collectives is None:
        return tensor
    held = tensor.to_local() if _torch.is_dtensor(tensor) else tensor
    waited = held.trigger_wait() if isinstance(held, collectives.AsyncCollectiveTensor) else held
    return waited if held is tensor else tensor


# --- FSDP2's mixed precision: dtypes in which a sharded module computes, though its parameters are held in another
def casts(module: nn.Module) -> tuple[torch.dtype | None, torch.dtype | None]:
    """Return the dtypes to which FSDP2 casts what goes into `module` and what comes out; None where it doesn't."""
    policy = _fsdp.policy(module) if _fsdp.is_sharded(module) else None
    if policy is None:
        return None, None
    return policy.param_dtype if policy.cast_forward_inputs else None, policy.output_dtype


def run(module: nn.Module, args: Any, kwargs: Any) -> Any:
    """Return what the forward of `module` gives, without hooks but with FSDP2's casts."""
    before, after = casts(module)
    args, kwargs = _cast((args, kwargs), before)
    return _cast(module.forward(*args, **kwargs), after)


def ungathered(module: nn.Module) -> None:
    """Take FSDP2's hooks off `module`, but for its casts: where its parameters are whole there is nothing to gather."""
    before, after = casts(module)
    own = vars(module)
    enter = {k: h for k, h in own["_forward_pre_hooks"].items() if not _fsdp.gathers(h)}
    leave = {k: h for k, h in own["_forward_hooks"].items() if not _fsdp.gathers(h)}
    own["_forward_pre_hooks"] = OrderedDict({-1: lambda _, *given: _cast(given, before), **enter})
    own["_forward_pre_hooks_with_kwargs"] = OrderedDict({**own["_forward_pre_hooks_with_kwargs"], -1: True})
    own["_forward_hooks"] = OrderedDict({**leave, -1: lambda _, given, out: _cast(out, after)})


def computed_in(modules: Iterable[nn.Module]) -> dict[int, torch.dtype]:
    """Return for the address of each parameter, sharded by FSDP2, of `modules` the dtype that it is gathered in."""
    return {
        id(p): dtype
        for m in modules
        if _fsdp.is_sharded(m) and (dtype := _fsdp.policy(m).param_dtype) is not None
        for p in _fsdp.sharded_parameters(m)
        if p.is_floating_point()
    }


def _cast(tree: Any, dtype: torch.dtype | None) -> Any:
    if dtype is None:
        return tree
    return pytree.tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, tree)
