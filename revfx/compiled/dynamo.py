"""A forward as `torch.compile` captures it: what `convert` does with one that its own recorder can't take.

Dynamo reads the Python code of the forward and makes graphs of it, in as many pieces as it takes: where the code asks
for the value of a tensor, or calls what can't be read, a graph ends and Python goes on. A graph with a reversible
region is run by revfx's backend over eager kernels; every other one is run as it was captured, under plain autograd.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import types
import warnings
import weakref
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from revfx import _fsdp, _torch
from revfx.ambient import ambient_state
from revfx.errors import Refusal, RevfxError
from revfx.passes._torch import updated_statistics
from revfx.rules import op_name


if TYPE_CHECKING:
    from revfx.passes.joint.rewrite import Report


REMEDY = (
    "Run this forward under `revfx.testing.store_activations()`, or convert the model with `capture='fx'` if it can be"
    " recorded so."
)


class Compiled:
    """A forward, compiled at its first call and again where dynamo's guards fail; `graphs` tells what was found.

    The `function` is not bound to the model, which messages call `name`, lest this object hold on to it.
    """

    def __init__(
        self, name: str, function: Callable[..., Any], exact: bool, anchor_every: int | None, grid: int | None
    ) -> None:
        self.name, self.function = name, function
        self.options = {"inner": "aot_eager", "exact": exact, "anchor_every": anchor_every, "grid": grid}
        self.graphs: list[Report] = []
        self.failures: list[Refusal] = []
        self.in_own_code = False  # whether a region ends in the forward's own code, not in a sub-module's
        self.plain_in: set[Any] = set()
        self.compiled: Callable[..., Any] | None = None

    @property
    def found(self) -> bool:
        """Return whether any graph so far has a reversible region."""
        return any(graph.regions for graph in self.graphs)

    @property
    def found_nothing(self) -> bool:
        """Return whether a call was captured, and no graph so far has a reversible region."""
        return bool(self.plain_in) and not self.found

    @property
    def refusals(self) -> list[Refusal]:
        """Return what was left as it was, and why."""
        why = "`torch.compile` captured no graph of it that has a gradient; TORCH_LOGS=graph_breaks says why"
        nothing = [Refusal(why, self.name, "")] if self.plain_in and not self.graphs and not self.failures else []
        return list(dict.fromkeys((*nothing, *self.failures, *(r for graph in self.graphs for r in graph.refusals))))

    def call(self, model: nn.Module, args: Sequence[Any], kwargs: Any) -> Any:
        """Return what `function(*args, **kwargs)` returns; `model` is the one whose forward it is."""
        mode = (model.training, ambient_state())
        if mode in self.plain_in or not _trains(model, args, kwargs):
            return self.function(*args, **kwargs)
        with contextlib.ExitStack() as stack:
            stack.enter_context(compiler().capturing())
            if self.compiled is None:
                self.compiled = torch.compile(with_own_code(self.function), backend=self._backend)
                stack.enter_context(warnings.catch_warnings())  # where a graph ends, plain code goes on: no news
                warnings.filterwarnings("ignore", module=r"torch\._dynamo\.")
                warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor that is not a leaf")
            result = self.compiled(*args, **kwargs)
        if not self.found:
            self.plain_in.add(mode)
        return result

    def _backend(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Return the function that runs one graph that dynamo captured."""
        from revfx.compiled import backend, partitioner

        plain = torch.compiler.disable(_uncompiled(gm).forward)
        if (reason := _written_wrongly(gm.graph)) is not None:
            self._fails(reason)
            return plain
        try:
            with partitioner.reports() as reports:
                compiled = backend.revfx(gm, inputs, options=self.options)
        except compiler().RestartAnalysis:  # dynamo's own: it captures again, knowing more
            raise
        except Exception as e:  # whatever the compiler can't do, the graph is still right under plain autograd
            self._fails(f"compiling a graph raised {type(e).__name__}: {(str(e).splitlines() or [''])[0]}")
            return plain
        self.graphs.extend(replace(report, details=()) for report in reports)  # which hold the graph
        regions = [region for report in reports for region in report.regions]
        self.in_own_code = self.in_own_code or any(_in_own_code(gm.graph, region.where[1]) for region in regions)
        return _checked(compiled, self.name, _statistics(gm.graph)) if regions else plain

    def _fails(self, reason: str) -> None:
        self.failures.append(Refusal(f"a graph of {self.name} stays as it was: {reason}", self.name, ""))


def compiler() -> types.ModuleType:
    """Return `_inductor`, imported late: it takes a second, and the compiler's warnings are none of the user's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from revfx.compiled import _inductor
    return _inductor


def _uncompiled(gm: fx.GraphModule) -> fx.GraphModule:
    """Return `gm` as plain autograd can run it: a checkpoint in it draws the same random numbers again.

    As dynamo captures it, it leaves them to the compiler, and would draw others: a wrong gradient and no error.
    """
    if not any(n.target is _CHECKPOINT for m in gm.modules() if isinstance(m, fx.GraphModule) for n in m.graph.nodes):
        return gm
    made = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    made.meta.update(gm.meta)
    for node in made.graph.nodes:
        if node.target is _CHECKPOINT:
            node.target = _checkpoint
    for name, part in made.named_children():
        if isinstance(part, fx.GraphModule):
            setattr(made, name, _uncompiled(part))
    made.recompile()
    return made


_CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint


def _checkpoint(part: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
    context = part.meta.get("_checkpoint_context_fn")
    given: dict[str, Any] = {**kwargs, "use_reentrant": False} | ({} if context is None else {"context_fn": context})
    return checkpoint(part, *args, **given)


def with_own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that calls `function`, with a code object that no other has.

    Dynamo keeps what it compiles with the code object: models of one class would share its limit of recompilations, and
    keep each other's graphs alive.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return types.FunctionType(run.__code__.replace(), run.__globals__, run.__name__, None, run.__closure__)


def _trains(model: nn.Module, args: Sequence[Any], kwargs: Any) -> bool:
    """Return whether anything that is known to go in requires a gradient."""
    leaves = (x for x in pytree.tree_leaves((tuple(args[1:]), kwargs)) if isinstance(x, Tensor))
    return any(p.requires_grad for p in model.parameters()) or any(x.requires_grad for x in leaves)


def _in_own_code(graph: fx.Graph, where: str) -> bool:
    """Return whether the line at `where` (file:line) is the compiled function's own, not a sub-module's."""
    file, _, line = where.rpartition(":")
    place = f'File "{file}", line {line},'
    return any(place in (n.stack_trace or "") for n in graph.nodes if not n.meta.get("nn_module_stack"))


def _written_wrongly(graph: fx.Graph) -> str | None:
    """Return why the compiler does not do right by an input without gradient that the graph writes to in place.

    torch's partitioner holds one that is also read to be there in the backward, and computes again from it what was
    computed before the write, with a wrong gradient and no error. And what is written to a single number in float64 is
    lost, as it may be one of Python's (both torch 2.13).
    """
    for node in graph.nodes:
        value = node.meta.get("example_value")
        if node.op != "placeholder" or not isinstance(value, Tensor) or value.requires_grad:
            continue
        if _torch.version(value) > 0 and not _only_written(node):
            return f"it reads `{node.name}` and writes it in place, so what it read is not there any more"
        if _torch.version(value) > 0 and value.dim() == 0 and value.dtype == torch.float64:
            return f"it writes to `{node.name}`, a single number in float64, and `torch.compile` may lose that"
    return None


def _only_written(node: fx.Node) -> bool:
    return all(u.op == "output" or (_in_place(u) and u.args[0] is node and _only_written(u)) for u in node.users)


def _in_place(node: fx.Node) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return (name.endswith("_") and not name.endswith("__")) or name in _OPERATORS


_OPERATORS = frozenset("iadd isub imul itruediv ipow".split())


def _statistics(graph: fx.Graph) -> frozenset[int]:
    """Return the places among a graph's inputs of running statistics that normalisations alone update."""
    updates = {n: updated_statistics(op_name(n.target), n.args, n.kwargs) for n in graph.nodes}
    written = {x for found in updates.values() for x in found}
    inputs = enumerate(n for n in graph.nodes if n.op == "placeholder")
    return frozenset(i for i, n in inputs if n in written and all(updates[u] or u.op == "output" for u in n.users))


def _checked(compiled: Callable[..., Any], name: str, uncounted: Collection[int]) -> Callable[..., Any]:
    """Return `compiled`, whose backward first makes sure that it may run.

    Its updates of the inputs `uncounted` are not counted by autograd, as those by plain normalisations are not: graphs
    that run plainly may have saved these.
    """

    @torch.compiler.disable
    def run(*args: Any) -> Any:
        own = {id(x) for x in args}
        leaves = [] if _fsdp.in_use() else [x for x in args if type(x) in (Tensor, nn.Parameter) and x.is_leaf]
        check = functools.partial(_check, name, [(weakref.ref(x), _torch.data_address(x)) for x in leaves])
        with _torch.uncounted_writes(tuple(args[i] for i in uncounted)):
            results = compiled(*args)
        for y in results:
            if isinstance(y, Tensor) and y.grad_fn is not None and id(y) not in own:
                y.register_hook(check)
        return results

    return run


def _check(name: str, leaves: Sequence[tuple[weakref.ref[Tensor], int | None]], grad: Tensor) -> None:
    """Raise where a compiled graph, whose backward `grad` is about to reach, may not regenerate its activations: the
    backward is to be differentiated itself, or would read other parameters than the forward did.
    """
    if torch.is_grad_enabled():
        raise RevfxError(
            f"`convert({name})`: this model was captured by `torch.compile`, and its backward can't be differentiated"
            f" again (`create_graph=True`). {REMEDY}"
        )
    for ref, address in leaves:
        leaf = ref()
        if leaf is not None and _torch.data_address(leaf) != address:
            raise RevfxError(
                f"`convert({name})`: a parameter, buffer or input of shape {list(leaf.shape)} was modified in place"
                f" (its `.data` was replaced) between forward and backward, which would regenerate other activations."
                f" {REMEDY}"
            )
