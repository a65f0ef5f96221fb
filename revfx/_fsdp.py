# pyright: reportPrivateUsage=false
"""Every use of private API of FSDP2, in one place. Read in torch 2.13 and 2.15."""

from __future__ import annotations

import sys
from typing import Any

import torch


def is_sharded(module: torch.nn.Module) -> bool:
    """Return whether `fully_shard` was applied to `module` (FSDP2 swaps its parameters' storage around every call)."""
    return any(c.__name__ == "FSDPModule" for c in type(module).__mro__)


def policy(module: Any) -> Any:
    """Return the `MixedPrecisionPolicy` that `fully_shard` was given for `module`."""
    return module._get_fsdp_state()._mp_policy


def sharded_parameters(module: Any) -> list[torch.Tensor]:
    """Return the sharded parameters that `fully_shard` gathers when `module` is called."""
    groups = module._get_fsdp_state()._fsdp_param_groups
    return [p.sharded_param for group in groups for p in group.fsdp_params]


def gathers(hook: Any) -> bool:
    """Return whether a hook of a module is FSDP2's, which gathers parameters and lets go of them."""
    return (getattr(hook, "__module__", None) or "").startswith("torch.distributed.fsdp")


def share_state(module: Any, twin: torch.nn.Module) -> None:
    """Make what `fully_shard` knows of `module` known of `twin` too, which has the same parameters and hooks: the
    methods that it adds, such as `set_requires_gradient_sync`, ask for it.
    """
    if is_sharded(module):
        from torch.distributed._composable_state import _insert_module_state

        _insert_module_state(twin, module._get_fsdp_state())


def in_use() -> bool:
    """Return whether `fully_shard` is in use in this process: storages of parameters then come and go by design."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return False
    from torch.distributed._composable_state import _module_state_mapping

    return len(_module_state_mapping) > 0
