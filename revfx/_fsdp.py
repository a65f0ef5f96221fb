# pyright: reportPrivateUsage=false
"""Every use of private API of FSDP2, in one place. Read in torch 2.13 and 2.15."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Iterator
from functools import cache
from typing import Any

import torch
from torch.utils import _pytree as pytree

from revfx import _torch
from revfx._substitute import Substitute


def is_sharded(module: torch.nn.Module) -> bool:
    """Return whether `fully_shard` was applied to `module` (FSDP2 swaps its parameters' storage around every call)."""
    return any(c.__name__ == "FSDPModule" for c in type(module).__mro__)


def _policy(module: Any) -> Any:
    """The `MixedPrecisionPolicy` of a module to which `fully_shard` was applied."""
    return module._get_fsdp_state()._mp_policy


def _fsdp_params(module: Any) -> Iterator[Any]:
    """Yield FSDP2's records of the parameters that it gathers when `module` is called."""
    for group in module._get_fsdp_state()._fsdp_param_groups:
        yield from group.fsdp_params


def io_dtypes(module: torch.nn.Module) -> tuple[torch.dtype | None, torch.dtype | None]:
    """Return the dtypes to which FSDP2 casts inputs and outputs of a module; None if it doesn't."""
    if not is_sharded(module):
        return None, None
    policy = _policy(module)
    inputs = policy.param_dtype if policy.cast_forward_inputs else None
    return inputs, policy.output_dtype


def remove_gather_hooks(module: torch.nn.Module) -> None:
    """Take FSDP2's hooks off `module`, but keep its casts: whole parameters need no gathering."""
    before, after = io_dtypes(module)
    own = vars(module)
    enter = {k: h for k, h in own["_forward_pre_hooks"].items() if not _is_fsdp_hook(h)}
    leave = {k: h for k, h in own["_forward_hooks"].items() if not _is_fsdp_hook(h)}
    own["_forward_pre_hooks"] = OrderedDict({-1: lambda _, *inputs: _cast(inputs, before), **enter})
    own["_forward_pre_hooks_with_kwargs"] = OrderedDict({**own["_forward_pre_hooks_with_kwargs"], -1: True})
    own["_forward_hooks"] = OrderedDict({**leave, -1: lambda _, inputs, out: _cast(out, after)})


def gathered_dtypes(modules: Iterable[torch.nn.Module]) -> dict[int, torch.dtype]:
    """Return, by the id of each parameter that FSDP2 shards in `modules`, the dtype that it is gathered in."""
    found: dict[int, torch.dtype] = {}
    for module in filter(is_sharded, modules):
        dtype = _policy(module).param_dtype
        for record in _fsdp_params(module):
            if dtype is not None and record.sharded_param.is_floating_point():
                found[id(record.sharded_param)] = dtype
    return found


def _cast(tree: Any, dtype: torch.dtype | None) -> Any:
    if dtype is None:
        return tree
    return pytree.tree_map_only(torch.Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, tree)


def _is_fsdp_hook(hook: Any) -> bool:
    """Return whether a hook of a module is FSDP2's, which gathers parameters and frees them."""
    return (getattr(hook, "__module__", None) or "").startswith("torch.distributed.fsdp")


def share_state(module: Any, twin: torch.nn.Module) -> None:
    """Share the state of `fully_shard` for `module` with `twin`, which has the same parameters and hooks.

    Methods that `fully_shard` adds, such as `set_requires_gradient_sync`, read it.
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
    """Return whether the storage of `t` was freed, as that of a gathered weight is when its module has run."""
    if t.layout != torch.strided or not _torch.is_plain(t) or t.is_nested:
        return False
    return t.untyped_storage().nbytes() == 0 and t.numel() > 0


def gather_weights(tensors: Iterable[torch.Tensor]) -> contextlib.AbstractContextManager[None]:
    """Return a context in which freed weights are gathered; all processes have to do so."""
    return _gathered(tensors) if in_use() else contextlib.nullcontext()


@contextlib.contextmanager
def _gathered(tensors: Iterable[torch.Tensor]) -> Generator[None]:
    freed = {_torch.storage_key(t) for t in tensors if is_freed(t)}
    owners = _find_owners(freed) if freed else []
    for module in owners:
        module.unshard()
    try:
        yield
    finally:
        for module in owners:
            module.reshard()


def _find_owners(storages: set[int]) -> list[Any]:
    """Find the modules to which `fully_shard` was applied that gather weights into some storages."""
    from torch.distributed._composable_state import _module_state_mapping

    modules: list[Any] = list(_module_state_mapping)
    return [m for m in filter(is_sharded, modules) if _gathers_into(m, storages)]


def _gathers_into(module: Any, storages: set[int]) -> bool:
    for record in _fsdp_params(module):
        outputs = getattr(record, "all_gather_outputs", ())
        if not storages.isdisjoint(map(_torch.storage_key, outputs)):
            return True
    return False


@contextlib.contextmanager
def quiet_gathers(hide: Callable[[], Any]) -> Generator[None]:
    """Open a context in which FSDP2 gathers and frees weights inside of contexts that `hide` returns."""
    if not in_use():
        yield
        return
    with contextlib.ExitStack() as stack:
        for substitute in _substitutes(hide):
            stack.enter_context(substitute.active())
        yield


@cache
def _substitutes(hide: Callable[[], Any]) -> list[Substitute]:
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

    found: list[Substitute] = []
    for name in ("unshard", "wait_for_unshard", "reshard"):
        found.append(Substitute(FSDPParamGroup, name, _hide_method(getattr(FSDPParamGroup, name), hide)))
    return found


def _hide_method(method: Callable[..., Any], hide: Callable[[], Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        with hide():
            return method(*args, **kwargs)

    return run
