# pyright: reportPrivateUsage=false
"""Every use of private API of torch's compiler, in one place. Read in torch 2.13 and 2.15.

Importing this module imports torch's compiler (about a second), so nothing does before a model is compiled.
"""

from __future__ import annotations

import contextlib
import os
import re
import types
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from functorch.compile import min_cut_rematerialization_partition
from torch import Tensor, fx
from torch._dynamo import config as dynamo_config, symbolic_convert
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import boxed_nop
from torch._dynamo.exc import TorchDynamoException as TorchDynamoException
from torch._dynamo.utils import counters, graph_break_reasons
from torch._functorch import config as functorch_config
from torch._functorch.compile_utils import fx_graph_cse
from torch._guards import TracingContext
from torch._inductor import config as inductor_config, list_mode_options as list_mode_options
from torch._inductor.codecache import BypassFxGraphCache as BypassFxGraphCache
from torch._inductor.compile_fx import compile_fx as compile_fx
from torch._inductor.custom_graph_pass import CustomPartitionerFn as CustomPartitionerFn
from torch._inductor.decomposition import select_decomp_table as select_decomp_table
from torch._inductor.virtualized import V

from revfx._fake import FAKE_LOGGER
from revfx.errors import BudgetWarning, warn
from revfx.passes.joint.forward import draws_numbers
from revfx.passes.sizes import mute_logger


_HAS_NUMBERS = "revfx_has_numbers"  # an attribute of inductor's schedulers
MAX_GRAPHS = 64  # of a function; further kinds of its calls run uncompiled


def storing_identity() -> tuple[Callable[..., Tensor], Callable[[Tensor], tuple[object, ...]]]:
    """Return an identity with a result that inductor stores and does not recompute, and its arguments for a value."""
    return torch.ops.prims.inductor_force_stride_order.default, lambda t: (t.stride(),)


def fuse_neighbours_only(key: str) -> None:
    """Let inductor fuse no distant nodes from now on, in graphs with nodes that have a number `node.meta[key]`.

    Nodes are distant if their numbers differ by more than 1. It also fuses no nodes if it would forget their order. The
    setting is for all threads: a backward is compiled by the thread that runs it first.
    """
    kind: Any = type(V.choices)
    original = kind.can_fuse
    if getattr(original, "revfx_key", None) == key:
        return

    def can_fuse(scheduler: Any, a: Any, b: Any, *args: Any) -> bool:
        if _has_numbers(scheduler, key):
            numbers: list[int] = []
            for node in (*a.get_nodes(), *b.get_nodes()):
                number = _number(node, key)
                if number is not None:
                    numbers.append(number)
            if (numbers and max(numbers) - min(numbers) > 1) or _forgets_order(scheduler, a, b):
                return False
        return original(scheduler, a, b, *args)

    vars(can_fuse)["revfx_key"] = key
    kind.can_fuse = staticmethod(can_fuse)


def _has_numbers(scheduler: Any, key: str) -> bool:
    """Return whether the graph that is scheduled has numbered nodes."""
    attributes = vars(scheduler)
    if _HAS_NUMBERS not in attributes:
        nodes = chain.from_iterable(node.get_nodes() for node in scheduler.nodes)
        attributes[_HAS_NUMBERS] = any(_number(n, key) is not None for n in nodes)
    return attributes[_HAS_NUMBERS]


def _forgets_order(scheduler: Any, a: Any, b: Any) -> bool:
    """Return whether torch might let a fused node read a buffer before an earlier write to it.

    torch 2.13 gives one of the nodes the other's loops on the CPU, and then forgets the write that it follows: silently
    wrong gradients, also without revfx (pytorch/pytorch#185509).
    """
    nodes, written = (*a.get_nodes(), *b.get_nodes()), set(scheduler.mutation_renames.values())
    loops = {getattr(n, "group", None) for n in nodes}
    reads = chain.from_iterable(n.read_writes.reads for n in nodes)
    return len(loops) > 1 and any(read.name in written for read in reads)


def _number(node: Any, key: str) -> int | None:
    """Return the largest number of the graph's nodes that a node of inductor's scheduler computes."""
    if node.node is None:
        return None
    return max((o.meta[key] for o in node.node.get_origins() if key in o.meta), default=None)


@contextlib.contextmanager
def merge_equal_nodes(gm: fx.GraphModule) -> Generator[None]:
    """Merge equal nodes of `gm`, and open a context in which the partitioner merges none.

    It would merge regenerated values with the forward's.
    """
    gm.graph.eliminate_dead_code()
    if functorch_config.cse:
        gm.graph = fx_graph_cse(gm.graph)
    with functorch_config.patch(cse=False):
        yield


def min_cut_partition(
    gm: fx.GraphModule, joint_inputs: Sequence[object], regenerates: bool, **kwargs: Any
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Split a joint graph by torch's own partitioner, without torch's `activation_memory_budget` if it does harm.

    Args:
        gm: the joint graph.
        joint_inputs: its inputs.
        regenerates: the graph regenerates activations already, so a budget adds nothing.
        kwargs: arguments of the partitioner.

    Returns:
        the forward and the backward graph.
    """
    changed: dict[str, Any] = {}
    budget = functorch_config.activation_memory_budget
    if regenerates:
        changed = {"activation_memory_budget": 1.0, "aggressive_recomputation": False}
    elif budget < 1 and any(map(draws_numbers, gm.graph.nodes)):  # torch draws them again (pytorch/pytorch#190717)
        changed = {"activation_memory_budget": 1.0}
        text = (
            "A compiled graph draws random numbers, as dropout does, and torch would draw others when it recomputes"
            f" them. So torch's `activation_memory_budget` of {budget} is not followed in this graph, and it takes more"
            " memory. Use `revfx.convert(model, memory=...)`, or `torch.utils.checkpoint` for the parts to recompute."
        )
        warn(text, BudgetWarning)
    with functorch_config.patch(changed):
        return min_cut_rematerialization_partition(gm, joint_inputs, **kwargs)


def run_by_eager_kernels(
    gm: fx.GraphModule, inputs: Sequence[Any], partition: Callable[..., Any]
) -> Callable[..., Any]:
    """Return a function that runs the forward and the backward of `gm`, as `partition` splits it, by eager kernels."""
    compiler = aot_autograd(
        fw_compiler=_eager_forward,
        bw_compiler=_eager_backward,
        partition_fn=partition,
        keep_inference_input_mutations=True,
    )
    return compiler(gm, list(inputs))


def _eager_forward(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """Return the forward; its backward may not write to saved tensors, as `retain_graph=True` would then fail."""
    metadata: Any = getattr(TracingContext.try_get(), "fw_metadata", None)
    if metadata is not None and metadata.bw_donated_idxs:
        metadata.bw_donated_idxs.clear()
    return boxed_nop(gm, inputs)


def _eager_backward(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    run: Any = boxed_nop(gm, inputs)
    if not isinstance(run, types.FunctionType):  # the caches of compiled graphs take these
        return run

    def backward(args: list[Any]) -> Any:
        if torch._C._is_any_autocast_enabled():
            return _AutocastBackward(gm).boxed_run(args)
        return run(args)

    vars(backward)["_boxed_call"] = True  # it empties `args`
    return backward


class _AutocastBackward(fx.Interpreter):
    """Runs a backward graph under the caller's autocast, as plain autograd does, except for regenerated values.

    The forward's casts are in the graph, and it had no others.
    """

    def run_node(self, n: fx.Node) -> Any:
        """Return the result of the node."""
        is_backward = n.meta.get("partitioner_tag") == "is_backward"
        with contextlib.nullcontext() if is_backward else torch._C._DisableAutocast():
            return super().run_node(n)


Partition = Callable[[Sequence[Any]], CustomPartitionerFn]  # for a graph's inputs


def partition_traced(partition: Partition) -> None:
    """Choose the partitioner of the graph that dynamo traces now, if inductor compiles it and the user chose none."""
    tracing = getattr(symbolic_convert.tls, "current_tx", None)
    if tracing is None:  # after a graph break, Python runs the code that dynamo did not trace
        return
    compiler = tracing.output.compiler_fn
    if not isinstance(compiler, _Partitioned):
        tracing.output.compiler_fn = _Partitioned(compiler, partition)


@dataclass(frozen=True)
class _Partitioned:
    """A compiler of dynamo's, with any wrappers, in which inductor has a partitioner."""

    compiler: Any
    partition: Partition

    @property
    def __name__(self) -> str:  # the name in errors
        return getattr(self.compiler, "__name__", type(self.compiler).__name__)

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
        chosen: Any = inductor_config.custom_partitioner_fn
        with inductor_config.patch(custom_partitioner_fn=chosen or self.partition(inputs)):
            return self.compiler(gm, inputs, **kwargs)


@contextlib.contextmanager
def graph_breaks() -> Generator[list[tuple[str, str]]]:
    """Open a context with a list; at its end the list has the reasons of dynamo's graph breaks: (reason, file:line)."""
    found: list[tuple[str, str]] = []
    before, skipped = len(graph_break_reasons), Counter(counters["unimplemented"])
    yield found
    for reason in graph_break_reasons[before:]:
        place = ""
        if reason.user_stack:
            place = f"{reason.user_stack[-1].filename}:{reason.user_stack[-1].lineno}"
        found.append((reason.reason.splitlines()[0], place))
    for text in Counter(counters["unimplemented"]) - skipped:
        frame = re.search(r"frame skipped: \w+ \((.*) line (\d+)\)", text)
        if frame is not None:
            reason = f"{text.splitlines()[0]} in a loop, so that all of this function runs plainly"
            found.append((reason, f"{frame[1]}:{frame[2]}"))


# They log tracebacks for code that can't be captured, and advice against graph breaks at `.item()`. The code runs
# uncompiled; if it raises an error there too, the user sees that.
MUTED_LOGGERS = ("torch._dynamo.convert_frame", "torch._dynamo.variables.tensor", FAKE_LOGGER)


@contextlib.contextmanager
def capturing() -> Generator[None]:
    """Open a context in which code that `torch.compile` can't capture runs uncompiled, for any settings of the user.

    Functions are captured again when a module gets hooks, and up to `MAX_GRAPHS` times.
    """
    with dynamo_config.patch(
        suppress_errors=True,
        error_on_recompile=False,
        fail_on_recompile_limit_hit=False,
        recompile_limit=MAX_GRAPHS,
        accumulated_recompile_limit=16 * MAX_GRAPHS,
        skip_nnmodule_hook_guards=False,
        allow_unspec_int_on_nn_module=True,
        optimize_ddp=False,
    ):
        with contextlib.ExitStack() as stack:
            if "TORCH_LOGS" not in os.environ:
                for name in MUTED_LOGGERS:
                    stack.enter_context(mute_logger(name))
            yield
