"""The inferred inverse of a model, as a module: it samples from a flow that was trained forwards."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from revfx import _torch
from revfx.arguments import normalize_arguments
from revfx.converted import unconverted
from revfx.engine.learn import Learning
from revfx.engine.native import learner
from revfx.engine.whole import undisturbed
from revfx.errors import NotReversibleError, name_of
from revfx.parts import attributes, content
from revfx.passes.rounding import MAX_ERROR
from revfx.plan.declared import CallObserver
from revfx.plan.model import seen_whole, tensors_in
from revfx.plan.solve import Forward, Solution, solve


MOST_PROGRAMS = 32  # for batch sizes and conditions, of which the oldest one makes room


def inverse(model: nn.Module, args: Any, kwargs: Mapping[str, Any] | None = None) -> InverseModule:
    """Infer the inverse of a model, as a module: `inverse(model, x)(model(x))` is `x`, up to rounding.

    The inverse shares the model's parameters and is differentiable with respect to them and to its inputs. It prints as
    its program: inverses of the model's operations in the opposite order, and its functions as they are. Functions that
    draw random numbers (dropout in training mode) can't be recomputed: call `model.eval()` first.

    Call the inverse with the model's result, or only with the tensors that it reads (`reads` names them), such as the
    latent variable without its log-determinant. Give conditions by name; one that is no tensor defaults to that of the
    example.

    Args:
        model: any module; a converted one counts as its original. Its forward runs once on the example, and again for
            other batch sizes, and when numbers that its modules hold have changed.
        args: example inputs, which the inverse returns: a tensor, or a tuple of positional arguments.
        kwargs: example conditions, such as a context, which the inverse takes by name.

    Raises:
        NotReversibleError: an input does not follow from the outputs; the text says which, and why. No step iterates to
            a fixed point, or solves for one element after the other.
        TypeError: `model` is not a module, or `args` is neither a tensor nor a tuple.
    """
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"`inverse` takes an nn.Module, not a {type(model).__name__}.")
    return InverseModule(unconverted(model), *normalize_arguments(args, kwargs))


@dataclass(frozen=True)
class Known:
    """A solution for arguments of some shapes and values.

    Attributes:
        solution: the inverse.
        spec: the structure of the model's result.
        outside: give the tensors of the model that the inverse reads.
        versions: those of them that are not trained, and how often each had been written to.
        state: the attributes of the model's modules besides tensors.
    """

    solution: Solution
    spec: pytree.TreeSpec
    outside: tuple[Callable[[], Tensor], ...]
    versions: tuple[tuple[Callable[[], Tensor], int, int], ...]
    state: Any

    def holds(self, state: Any) -> bool:
        """Return whether the model is as it was."""
        same = all(id(t()) == number and _torch.version(t()) == version for t, number, version in self.versions)
        return same and self.state == state


class InverseModule(nn.Module):
    """The inverse of a model, for tensors with the shapes of its examples; see `inverse`."""

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = model
        self._example = pytree.tree_map_only(Tensor, lambda t: t.detach(), (args, dict(kwargs)))
        self._solutions: dict[Any, Known] = {}
        self._first = self._solve(None, *self._example)
        if self._first.solution.believed:
            self._check(self._first.solution.believed)

    @property
    def reads(self) -> list[str]:
        """Return which tensors of the model's result are read: `y`, `y[0]` or `y["name"]`."""
        spec = self._first.spec
        leaves, _ = pytree.tree_flatten_with_path(pytree.tree_unflatten(range(spec.num_leaves), spec))
        return [f"y{pytree.keystr(leaves[k][0])}" for k in self._first.solution.reads]

    @property
    def conditions(self) -> list[str]:
        """Return the arguments that have to be given by name."""
        return list(dict.fromkeys(self._names[i] for i in self._first.solution.conditions))

    def forward(self, *given: Any, **conditions: Any) -> Any:
        """Return the model's inputs: one, or a tuple of those that are, or hold, tensors.

        Raises:
            TypeError: more or less is given than `reads` and `conditions` name, or tensors of other shapes.
        """
        outputs = self._read(given)
        known = self._known_for(outputs, conditions)
        solution = known.solution
        leaves = pytree.tree_leaves((self._example[0], {**self._example[1], **conditions}))
        tensors = [*outputs, *(leaves[i] for i in solution.conditions), *(place() for place in known.outside)]
        return self._put_together(dict(zip(solution.inputs, solution.run(tensors), strict=True)))

    # --- arguments and results
    @functools.cached_property
    def _names(self) -> list[str]:
        """Return for each leaf of the example how the model calls the argument that it is in."""
        args, kwargs = self._example
        parameters = inspect.signature(self.model.forward).parameters.values()
        names = [p.name for p in parameters if p.kind < p.VAR_POSITIONAL]
        names += [f"input {k}" for k in range(len(names), len(args))]
        given = (*zip(names, args, strict=False), *kwargs.items())
        return [name for name, value in given for _ in pytree.tree_leaves(value)]

    def _read(self, given: tuple[Any, ...]) -> list[Tensor]:
        """Return the tensors that are read of the model's result, or of its stand-in."""
        found = list(given)
        reads = self._first.solution.reads
        if len(given) == 1:
            leaves, spec = pytree.tree_flatten(given[0])
            if spec == self._first.spec:
                found = [leaves[k] for k in reads]
        if len(found) != len(reads) or not all(isinstance(t, Tensor) for t in found):
            raise TypeError(
                f"the inverse of {name_of(self.model)} takes what the model returned, or of it {', '.join(self.reads)}."
            )
        return found

    def _put_together(self, leaves: Mapping[int, Tensor]) -> Any:
        args, _ = self._example
        flat, spec = pytree.tree_flatten(args)
        found = pytree.tree_unflatten([leaves.get(i, leaf) for i, leaf in enumerate(flat)], spec)
        found = tuple(x for x in found if any(isinstance(t, Tensor) for t in pytree.tree_leaves(x)))
        return found[0] if len(found) == 1 else found

    # --- programs, by batch size and conditions
    @_torch.breaks_graph
    def _known_for(self, outputs: list[Tensor], conditions: Mapping[str, Any]) -> Known:
        """Return the solution for such tensors, like the example's but for the batch; new if the model has changed."""
        args, known = self._example
        if not conditions.keys() <= known.keys() or not conditions.keys() >= {*self.conditions}:
            theirs = ", ".join(f"`{n}`" for n in self.conditions) or "none"
            raise TypeError(f"the inverse of {name_of(self.model)} takes these arguments by name: {theirs}.")
        shapes = tuple(tuple(t.shape) for t in outputs)
        same = shapes == self._first.solution.shapes
        rows = None if same or not outputs[0].dim() else outputs[0].shape[0]
        names = [n for n in conditions if content(conditions[n]) != content(known[n])]
        kind = None if rows is None and not names else (rows, tuple((n, content(conditions[n])) for n in names))
        found = self._solutions.get(kind)
        if found is None or not found.holds(_state_of(self.model)):
            if rows is not None:
                args = _with_rows(args, rows)
            found = self._solve(kind, args, {**known, **conditions})
        if found.solution.reads != self._first.solution.reads:
            raise TypeError(f"the inverse of {name_of(self.model)} would read other results for these conditions.")
        for want, got in zip(found.solution.shapes, shapes, strict=True):
            if want != got:
                raise TypeError(f"the inverse of {name_of(self.model)} was given {list(got)}, not {list(want)}.")
        return found

    def _solve(self, kind: Any, args: Any, kwargs: Any) -> Known:
        """Run the model's forward once, and find its inverse."""
        learning = learner(Learning)(self.model, tensors_in((args, kwargs)))
        with torch.enable_grad(), undisturbed(self.model), seen_whole(), learning, CallObserver(learning):
            out = self.model(*args, **kwargs)
        results, spec = pytree.tree_flatten(out)
        learning.tape.returned = [learning.number(t) for t in results if isinstance(t, Tensor)]
        theirs = len(pytree.tree_leaves(args))
        inputs: dict[int, int] = {}
        conditions: dict[int, int] = {}
        for i, leaf in enumerate(pytree.tree_leaves((args, kwargs))):
            if isinstance(leaf, Tensor):
                (inputs if i < theirs else conditions)[i] = learning.number(leaf)
        outputs = {k: learning.number(t) for k, t in enumerate(results) if isinstance(t, Tensor)}
        solution = solve(Forward(learning.tape, inputs, conditions, outputs, self._names), name_of(self.model))
        named = _places(self.model)
        outside: list[Callable[[], Tensor]] = []
        for value in solution.outside:
            t = learning.tensor(value)
            assert t is not None  # the model holds it
            outside.append(named.get(id(t)) or functools.partial(_itself, t))
        versions = [(place, id(place()), _torch.version(place())) for place in outside if not place().requires_grad]
        known = Known(solution, spec, tuple(outside), tuple(versions), _state_of(self.model))
        if len(self._solutions) >= MOST_PROGRAMS:
            del self._solutions[next(iter(self._solutions))]
        self._solutions[kind] = known
        return known

    def _check(self, names: Sequence[str]) -> None:
        """Try functions that are inverted by themselves once, on the example, as nobody else knows whether they are."""
        args, kwargs = self._example
        with torch.no_grad(), undisturbed(self.model):
            back = pytree.tree_leaves(self(self.model(*args, **kwargs), **kwargs))
        wanted = [t for t in pytree.tree_leaves(args) if isinstance(t, Tensor)]
        off = [float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in zip(back, wanted, strict=True)]
        if not all(error < MAX_ERROR for error in off):
            text = f"{', '.join(f'`{n}`' for n in names)}, told to invert, does not give the example back"
            raise NotReversibleError(f"`inverse`: {text}: it is off by {max(off):.0e}", names[0])

    def extra_repr(self) -> str:
        """Return the program, for `print`."""
        return self._first.solution.code

    def __reduce__(self) -> Any:
        """Return how it is pickled and copied: as the model and the example; programs are found again."""
        return InverseModule, (self.model, *self._example)


def _itself(t: Tensor) -> Tensor:
    return t


def _places(model: nn.Module) -> dict[int, Callable[[], Tensor]]:
    """Return, by the id of each parameter and buffer, a function that finds the current one."""
    found: dict[int, Callable[[], Tensor]] = {}
    for module in model.modules():
        for name, t in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            found[id(t)] = functools.partial(getattr, module, name)
    return found


def _with_rows(args: Any, rows: int) -> Any:
    """Return arguments of another batch size: the rows of the example again and again."""
    size = next((t.shape[0] for t in pytree.tree_leaves(args) if isinstance(t, Tensor) and t.dim()), 0)

    def resized(t: Tensor) -> Tensor:
        return t[torch.arange(rows, device=t.device) % size] if size and t.shape[:1] == (size,) else t

    return pytree.tree_map_only(Tensor, resized, args)


def _state_of(model: nn.Module) -> Any:
    """Return a key of the code of a model's modules: their attributes besides tensors."""
    return [(id(module), attributes(module)) for module in model.modules()]
