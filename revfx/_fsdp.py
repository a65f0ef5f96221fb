# pyright: reportPrivateUsage=false
"""Every use of private API of FSDP2, in one place. Read in torch 2.13 and 2.15."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable
from functools import cache
from typing import Any

import torch
from torch.utils import _pytree as pytree

from revfx import _torch
from revfx._substitute import Substitute


def is_sharded(module: torch.nn.Module) -> bool:
    """Return whether `fully_shard` was applied to `module` (FSDP2 swaps its parameters' storage around every call)."""
    return any(c.__name__ == "FSDPModule" for c in type(module).__mro__)


def policy(module: Any) -> Any:
    """Return the `MixedPrecisionPolicy` that `fully_shard` was given for `module`."""
    return module._get_fsdp_state()._mp_policy


def casts(module: torch.nn.Module) -> tuple[torch.dtype | None, torch.dtype | None]:
    """Return the dtypes to which FSDP2 casts inputs and outputs of a module; None if it doesn't."""
    found = policy(module) if is_sharded(module) else None
    if found is None:
        return None, None
    return found.param_dtype if found.cast_forward_inputs else None, found.output_dtype


def ungathered(module: torch.nn.Module) -> None:
    """Take FSDP2's hooks off `module`, but for its casts: where its parameters are whole there is nothing to gather."""
    before, after = casts(module)
    own = vars(module)
    enter = {k: h for k, h in own["_forward_pre_hooks"].items() if not gathers(h)}
    leave = {k: h for k, h in own["_forward_hooks"].items() if not gathers(h)}
    own["_forward_pre_hooks"] = OrderedDict({-1: lambda _, *given: _cast(given, before), **enter})
    own["_forward_pre_hooks_with_kwargs"] = OrderedDict({**own["_forward_pre_hooks_with_kwargs"], -1: True})
    own["_forward_hooks"] = OrderedDict({**leave, -1: lambda _, given, out: _cast(out, after)})


def computed_in(modules: Iterable[torch.nn.Module]) -> dict[int, torch.dtype]:
    """Return for the address of each parameter, sharded by FSDP2, of `modules` the dtype that it is gathered in."""
    return {
        id(p): dtype
        for m in modules
        if is_sharded(m) and (dtype := policy(m).param_dtype) is not None
        for p in sharded_parameters(m)
        if p.is_floating_point()
    }


def _cast(tree: Any, dtype: torch.dtype | None) -> Any:
    if dtype is None:
        return tree
    return pytree.tree_map_only(torch.Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, tree)


def sharded_parameters(module: Any) -> list[torch.Tensor]:
    """Return the sharded parameters that `fully_shard` gathers when `module` is called."""
    groups = module._get_fsdp_state()._fsdp_param_groups
    return [p.sharded_param for group in groups for p in group.fsdp_params]


def gathers(hook: Any) -> bool:
    """Return whether a hook of a module is FSDP2's, which gathers parameters and lets go of them."""
    return (getattr(hook, "__module__", None) or "").startswith("torch.distributed.fsdp")


def share_state(module: Any, twin: torch.nn.Module) -> None:
    """Share the state of `fully_shard` for `module` with `twin`, which has the same parameters and hooks: the
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


def is_freed(t: torch.Tensor) -> bool:
    """Return whether the memory of `t` was freed, as that of a gathered weight is when its module has run."""
    if t.layout != torch.strided or not _torch.is_plain(t) or t.is_nested:
        return False
    return t.untyped_storage().nbytes() == 0 and t.numel() > 0


@contextlib.contextmanager
def gathered(tensors: Iterable[torch.Tensor]) -> Generator[None]:
    """Open a context in which freed weights are gathered; all processes have to do so."""
    freed = {_torch.storage_key(t) for t in tensors if is_freed(t)} if in_use() else set[int]()
    owners = _owners(freed) if freed else []
    for module in owners:
        module.unshard()
    try:
        yield
    finally:
        for module in owners:
            module.reshard()


def _owners(storages: set[int]) -> list[Any]:
    """Return the modules to which `fully_shard` was applied that gather weights into some storages."""
    from torch.distributed._composable_state import _module_state_mapping

    found: list[Any] = []
    modules: list[Any] = list(_module_state_mapping)
    for module in modules:
        if not is_sharded(module):
            continue
        for group in module._get_fsdp_state()._fsdp_param_groups:
            outputs = [t for param in group.fsdp_params for t in getattr(param, "all_gather_outputs", ())]
            if not storages.isdisjoint(map(_torch.storage_key, outputs)):
                found.append(module)
    return found


@contextlib.contextmanager
def quiet_gathers(unseen: Callable[[], Any]) -> Generator[None]:
    """Open a context in which weights are gathered in contexts that `unseen` returns: they are there, or not."""
    if not in_use():
        yield
        return
    with contextlib.ExitStack() as stack:
        for substitute in _substitutes(unseen):
            stack.enter_context(substitute.active())
        yield


@cache
def _substitutes(unseen: Callable[[], Any]) -> list[Substitute]:
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

    found: list[Substitute] = []
    for name in ("unshard", "wait_for_unshard", "reshard"):
        found.append(Substitute(FSDPParamGroup, name, _unseen_method(getattr(FSDPParamGroup, name), unseen)))
    return found


def _unseen_method(method: Callable[..., Any], unseen: Callable[[], Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        with unseen():
            return method(*args, **kwargs)

    return run
