# pyright: reportPrivateUsage=false, reportAttributeAccessIssue=false, reportPrivateImportUsage=false
"""Every use of private torch API, in one place. Read in torch 2.13 and 2.15.

Each function names its purpose, so that a public spelling can take its place when there is one.
"""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Callable, Generator
from functools import partial
from itertools import chain, product
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch._subclasses import FakeTensor
from torch.utils import _python_dispatch


_F = TypeVar("_F", bound=Callable[..., Any])


def is_dtensor(value: object) -> bool:
    """Return whether `value` is a DTensor, a tensor in pieces on several processes."""
    distributed = sys.modules.get("torch.distributed.tensor")
    return distributed is not None and isinstance(value, distributed.DTensor)


def is_fake(value: object) -> bool:
    """Return whether `value` is a fake tensor."""
    return isinstance(value, FakeTensor)


def is_fake_class(kind: type) -> bool:
    """Return whether tensors of a class are fake."""
    return issubclass(kind, FakeTensor)


def is_plain(tensor: torch.Tensor) -> bool:
    """Return whether `tensor` is an ordinary tensor, a parameter or a fake tensor, and of no other subclass."""
    return type(tensor) in (torch.Tensor, torch.nn.Parameter, FakeTensor)


def storage_key(tensor: torch.Tensor) -> int:
    """Return a number that two live tensors share exactly when they share a storage."""
    return tensor.untyped_storage()._cdata


def users_of(storage: torch.UntypedStorage) -> int:
    """Return how many tensors share a storage."""
    return torch._C._storage_Use_Count(storage._cdata) - 1  # and the object in Python


# The number of the backward pass that runs on this thread; -1 outside any.
graph_task_id: Callable[[], int] = torch._C._current_graph_task_id
# The node of autograd's graph that runs on this thread; None outside any backward.
backward_node: Callable[[], Any] = torch._C._current_autograd_node
# A context in which operators run as autograd runs them, with gradients on, and record nothing.
below_autograd: Any = torch._C._AutoDispatchBelowAutograd


def trace_allocations(ready: Callable[[], Callable[[], Any]]) -> tuple[Any, list[int]]:
    """Return the result of `ready()()` and its allocations on the CPU, in bytes and in order.

    The first number is the sum over `ready()`. Those of the second call follow; memory that it frees counts negative.
    """
    # The legacy profiler belongs to its thread: the user's own profiler may be active on another.
    autograd, options = _C._autograd, (False, True, False, False, False)  # memory alone
    config = _C._profiler.ProfilerConfig(_C._profiler.ProfilerState.CPU, *options, _C._profiler._ExperimentalConfig())
    autograd._enable_profiler_legacy(config)
    try:
        run = ready()
        with torch.autograd.profiler.record_function("run"):
            out = run()
    finally:
        events = list(chain.from_iterable(autograd._disable_profiler_legacy()))
    start = next(i for i, e in enumerate(events) if e.name() == "run")
    sizes = [e.cpu_memory_usage() if e.kind() == "memory_alloc" else 0 for e in events]
    return out, [sum(sizes[:start]), *sizes[start:]]


def allocated(device: torch.device) -> tuple[int, int] | None:
    """Return the current and the largest bytes allocated on an accelerator; None if nothing counts them."""
    if device.type in ("cpu", "meta"):
        return None
    return torch.accelerator.memory_allocated(device), torch.accelerator.max_memory_allocated(device)


def has_saved_tensors_hooks() -> bool:
    """Return whether hooks on saved tensors are active."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def at_end_of_backward(callback: Callable[[], None]) -> None:
    """Have `callback` run when the backward pass that runs on this thread has ended."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def bars_reruns() -> bool:
    """Return whether TorchScript traces, forward-mode differentiation is open, or `parametrize.cached()` is active."""
    tangents, cached = torch.autograd.forward_ad._current_level >= 0, torch.nn.utils.parametrize._cache_enabled > 0
    return torch.jit.is_tracing() or tangents or cached


def in_functorch_transform() -> bool:
    """Return whether a torch.func transform is active; saved-tensor hooks are not supported there."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def constant_when_compiled(function: _F) -> _F:
    """Mark `function`: its result is a constant of a compiled program.

    `torch.compiler.assume_constant_result` does the same, but takes a second to import the compiler.
    """
    vars(function)["_dynamo_marked_constant"] = True
    return function


def breaks_graph(function: _F) -> _F:
    """Mark `function`: `torch.compile` ends the graph at its call and leaves it uncompiled."""
    vars(function)["_torchdynamo_disable"] = True
    return never_compiled(function)


def is_compiled(module: torch.nn.Module) -> bool:
    """Return whether calls of a module run compiled code."""
    return module._compiled_call_impl is not None or is_optimized(module)


def is_optimized(module: torch.nn.Module) -> bool:
    """Return whether a module is the result of `torch.compile(module)`."""
    return type(module).__name__ == "OptimizedModule"


def is_compiled_node(node: Any) -> bool:
    """Return whether a node of autograd's graph runs a compiled backward."""
    return node.name().startswith("CompiledFunction")


UNCOMPILED_CALL: Any = torch.nn.Module._call_impl  # hooks and forward, without `module.compile()`
COMPILED = "_compiled_call_impl"  # the attribute with the call that `module.compile()` makes


def never_compiled(function: _F) -> _F:
    """Mark `function`: `torch.compile` leaves it, and all that it calls, uncompiled.

    `torch.compiler.disable` does the same, but imports the compiler and costs time in each call.
    """
    if function.__code__ not in _uncompiled:
        frames: Any = torch._C._dynamo.eval_frame
        skip = frames._FrameAction.SKIP
        frames.set_code_exec_strategy(function.__code__, frames._FrameExecStrategy(skip, skip))
        _uncompiled.add(function.__code__)
    return function


_uncompiled: set[Any] = set()


# --- settings that decide which kernel runs, and how it rounds
_C: Any = torch._C
_FP32 = [*product(("cuda", "mkldnn"), ("all", "matmul", "conv", "rnn")), ("generic", "all")]
_SWITCHES = "mkldnn_enabled", "mkldnn_deterministic", "cudnn_enabled", "cudnn_benchmark", "cudnn_deterministic"
_ATTENTION = "flash", "mem_efficient", "math", "cudnn", "overrideable"
_SETTINGS: list[tuple[Callable[[], Any], Callable[[Any], None]]] = [
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_float32_matmul_precision, _C._set_float32_matmul_precision),
    (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    *((getattr(_C, f"_get_{name}"), getattr(_C, f"_set_{name}")) for name in _SWITCHES),
    *((getattr(_C, f"_get_{name}_sdp_enabled"), getattr(_C, f"_set_sdp_use_{name}")) for name in _ATTENTION),
    (lambda: tuple(_C._get_sdp_priority_order()), lambda order: _C._set_sdp_priority_order([*order])),
    *(
        (partial(_C._get_fp32_precision_getter, b, op), partial(_C._set_fp32_precision_setter, b, op))
        for b, op in _FP32
    ),
]


def kernel_settings() -> tuple[Any, ...]:
    """Return the default dtype, the number of threads, and the settings of oneDNN, cuDNN, TF32 and attention."""
    return tuple([get() for get, _ in _SETTINGS])


def set_kernels(now: tuple[Any, ...], to: tuple[Any, ...]) -> None:
    """Set the kernel settings `to` that differ from those of `now`."""
    for (_, set_value), value_now, value in zip(_SETTINGS, now, to, strict=True):
        if value_now != value:
            set_value(value)


# A module's own tables: of parameters and buffers, to read and to write; of sub-modules, to read.
parameters: Callable[[torch.nn.Module], dict[str, torch.nn.Parameter | None]] = attrgetter("_parameters")
buffers: Callable[[torch.nn.Module], dict[str, torch.Tensor | None]] = attrgetter("_buffers")
children: Callable[[torch.nn.Module], dict[str, torch.nn.Module | None]] = attrgetter("_modules")


def caller() -> Any:
    """Return the stack frame of the function that called this function's caller."""
    return sys._getframe(2)


def packet_name(op: object) -> str:
    """Return the bare name of an operator overload, `add` of `aten.add.Tensor`; the empty string of anything else."""
    return op.overloadpacket.__name__ if isinstance(op, torch._ops.OpOverload) else ""


def hook_tables(module: torch.nn.Module) -> tuple[dict[int, Any], ...]:
    """Return the module's own tables of hooks on its calls, with the tables of their options."""
    called = module._forward_hooks, module._forward_hooks_with_kwargs, module._forward_hooks_always_called
    before = module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs
    return *called, *before, module._backward_hooks, module._backward_pre_hooks


def version(tensor: torch.Tensor) -> int:
    """Return the number of writes in place to `tensor`; 0 for inference tensors, which have no counter."""
    try:
        return tensor._version
    except RuntimeError:
        return 0


def is_capturing(t: torch.Tensor) -> bool:
    """Return whether kernels on the device of `t` are being captured: they run later, so no value can be read."""
    return t.is_cuda and torch.cuda.is_current_stream_capturing()


def checked_version(t: torch.Tensor, before: int) -> torch.Tensor:
    """Return `t`, or raise autograd's error if it was written to after version `before`."""
    if version(t) != before:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation:"
            f" [{t.dtype}, {list(t.shape)}] is at version {version(t)}; expected version {before} instead."
        )
    return t


no_dispatch: Any = _python_dispatch._disable_current_modes  # a context in which no dispatch mode is active


def data_address(t: torch.Tensor) -> int | None:
    """Return the address of a tensor's elements; None for subclasses and layouts without one."""
    if type(t) in (torch.Tensor, torch.nn.Parameter) and t.layout == torch.strided:
        return t.data_ptr()
    return None


@contextlib.contextmanager
def pause_collector() -> Generator[None]:
    """Open a context without garbage collection: while a graph grows, the collector only visits its live cycles.

    At 200 layers of a transformer it took a third of the rewrite. Autograd on fake tensors gains as much.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
