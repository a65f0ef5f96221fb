# pyright: reportPrivateUsage=false, reportAttributeAccessIssue=false
"""Private API of torch that the engine stands on: dispatch keys, modes and hooks. Read in torch 2.13."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Sequence
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._guards import CompileContext
from torch.autograd import grad_mode
from torch.utils import _python_dispatch
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type

from revfx import _torch
from revfx._substitute import Substitute


_C: Any = torch._C
# The keys of this thread outside of any forward, and those with which Python's modes see nothing.
_INCLUDED, _OUTSIDE = _C._dispatch_tls_local_include_set(), _C._dispatch_tls_local_exclude_set()
with _C._DisableTorchDispatch():
    _UNSEEN = _C._dispatch_tls_local_exclude_set()
    with _C._AutoDispatchBelowAutograd(), _C._DisableAutocast():
        _REPLAYING = _C._dispatch_tls_local_exclude_set()


on_fakes: ContextVar[bool] = ContextVar("revfx_on_fakes", default=False)  # forwards run on fake tensors, to be counted


def replaying() -> Any:
    """Return a context in which operators run as autograd and autocast run them, unseen by dispatch modes.

    Those on fake tensors are seen, as they are dispatched to the class of these tensors.
    """
    return _below_autocast() if on_fakes.get() else _C._ForceDispatchKeyGuard(_INCLUDED, _REPLAYING)


@contextlib.contextmanager
def _below_autocast() -> Generator[None]:
    with _C._AutoDispatchBelowAutograd(), _C._DisableAutocast():
        yield


def unseen() -> Any:
    """Return a context in which operators run as outside of any forward, unseen by dispatch modes."""
    return outside() if on_fakes.get() else _C._ForceDispatchKeyGuard(_INCLUDED, _UNSEEN)


@contextlib.contextmanager
def outside() -> Generator[None]:
    """Open a context in which the class of a tensor sees operators, as outside of any forward, and modes do not."""
    with _C._ForceDispatchKeyGuard(_INCLUDED, _OUTSIDE), _torch.no_dispatch():
        yield


def alias(tensor: Tensor) -> Tensor:
    """Return `tensor` without its history, unseen by dispatch modes, wherever this is called.

    Writes to either tensor are counted for both; the result of `detach` below autograd has a count of its own. An
    alias goes on to show the old memory after `p.data = ...`.
    """
    if _torch.is_plain(tensor):
        with unseen():
            return tensor.detach()
    with outside(), torch.no_grad():
        return tensor.detach()


def aliases(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return an alias of each tensor."""
    if not all(map(_torch.is_plain, tensors)):
        return [alias(t) for t in tensors]
    with unseen():
        return [t.detach() for t in tensors]


def version_counters(tensors: Sequence[Tensor]) -> list[tuple[Tensor, int]]:
    """Return of each tensor an empty one which goes on to count the writes to its memory, and the count now."""
    counted = [t for t in tensors if _torch.is_plain(t) and not (_torch.is_fake(t) or t.is_nested or t.is_inference())]
    counted = [t for t in counted if t.layout == torch.strided]
    found = aliases(counted)
    for counter in found:
        counter.data = _empty(counter.dtype, counter.device)
    return [(counter, _torch.version(counter)) for counter in found]


def writes_uncounted(tensors: Iterable[Tensor]) -> Any:
    """Return a context in which the version counters of tensors stay as they are."""
    return grad_mode._unsafe_preserve_version_counter(tuple(tensors))


NATIVE_KEY = "Fake"  # the dispatch key of the native watcher


@contextlib.contextmanager
def unwatched() -> Generator[None]:
    """Open a context in which neither dispatch modes nor the native watcher see operators."""
    key = _C.DispatchKeySet(_C._parse_dispatch_key(NATIVE_KEY))
    with _torch.no_dispatch(), _C._ExcludeDispatchKeyGuard(key):
        yield


def push_mode(mode: TorchDispatchMode) -> None:
    """Turn a dispatch mode on; in a node of autograd's graph it lasts until the node has run."""
    _python_dispatch._push_mode(mode)


@cache
def _empty(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(0, dtype=dtype, device=device)


def has_modes() -> bool:
    """Return whether dispatch modes are on, which would see, or change, operators beside those of a forward."""
    stack = _python_dispatch._get_current_dispatch_mode_stack()
    return any(getattr(mode, "_mode_key", None) is None for mode in stack)


def innermost_mode() -> TorchDispatchMode | None:
    """Return the innermost dispatch mode that is on."""
    return next(reversed(_python_dispatch._get_current_dispatch_mode_stack()), None)


@cache
def is_wrapper(kind: type) -> bool:
    """Return whether tensors of a class are made of others, which it tells."""
    return is_traceable_wrapper_subclass_type(kind)


def is_compiling() -> bool:
    """Return whether dynamo compiles a function on this thread: it runs operators on tensors without memory."""
    return CompileContext.try_get() is not None


def autograd_time() -> int:
    """Return the number of the node that autograd makes next on this thread."""
    return _C._autograd._get_sequence_nr()


def is_older(tensor: Tensor, time: int) -> bool:
    """Return whether a tensor that needs a gradient is a leaf, or was made before a time of autograd."""
    node: Any = tensor.grad_fn
    return tensor.requires_grad and (node is None or node._sequence_nr() < time)


# --- saved-tensor hooks
_disable_hooks = _C._autograd._saved_tensors_hooks_disable


def _disable_ours_too(error_message: str, fail_if_non_empty: bool = True) -> None:
    """Disable saved-tensor hooks, as `torch.func` does: it refuses those that are set, but ours just look on."""
    top = hooks_around()
    if top is not None and getattr(getattr(top[0], "__self__", None), "looks_on", False):
        fail_if_non_empty = False
    _disable_hooks(error_message, fail_if_non_empty)


_substitute = Substitute(_C._autograd, "_saved_tensors_hooks_disable", _disable_ours_too)


@contextlib.contextmanager
def hooks_that_look_on(pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]) -> Generator[None]:
    """Set saved-tensor hooks which `torch.func` disables without an error; their owner's `looks_on` is true."""
    with _substitute.active(), torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def hooks_around() -> Any:
    """Return the innermost saved-tensor hooks that are set, as a pair; None if there are none."""
    return _C._autograd._top_saved_tensors_default_hooks(True)


def has_innermost_hooks(owner: Any) -> bool:
    """Return whether the innermost saved-tensor hooks are methods of an object, and are not disabled."""
    top = hooks_around()
    is_own = top is not None and getattr(top[0], "__self__", None) is owner
    return is_own and _C._autograd._saved_tensors_hooks_is_enabled()


class HookedMode(TorchDispatchMode):
    """A dispatch mode with saved-tensor hooks, in which dynamo goes on."""

    supports_higher_order_operators = True
    looks_on = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def set_hooks(self, pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]) -> None:
        """Set the hooks, owned by this mode, for the time that it is entered."""
        self._hooks: Any = hooks_that_look_on(pack, unpack)

    def __enter__(self) -> Any:
        self._hooks.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._hooks.__exit__(*error)
        self._hooks = None  # it holds this object


# --- the key of the native watcher
def pass_higher_order_operators() -> None:
    """Have higher-order operators (`torch.cond`) pass the key of the native watcher."""
    key = _C._parse_dispatch_key(NATIVE_KEY)
    operators: Any = torch._ops
    operators._HIGHER_ORDER_OP_DEFAULT_FALLTHROUGH_DISPATCH_KEYS.append(key)  # of those that are yet to come
    for operator in operators._higher_order_ops.values():
        operator.fallthrough(key)
