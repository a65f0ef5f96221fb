"""The inferred inverse of a model, as a module: what samples from a flow that was trained forwards."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from revfx import _torch
from revfx.arguments import normalize_arguments
from revfx.capture.guards import key, name_of
from revfx.capture.solve import Solution, Solver
from revfx.converted import unconverted
from revfx.errors import NotReversibleError
from revfx.passes.closure import Invert
from revfx.passes.rounding import MAX_ERROR


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
        model: any module; a converted one counts as its original. It is recorded on fake tensors with the shapes and
            dtypes of the example, and again for other batch sizes.
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


class InverseModule(nn.Module):
    """The inverse of a model, for what is shaped as its examples were; see `inverse`."""

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = model
        self._example = pytree.tree_map_only(Tensor, lambda t: t.detach(), (args, dict(kwargs)))
        self._solutions: dict[Any, Solution] = {}
        self._first = self._solve(None, *self._example)
        if self._first.believed:
            self._check(self._first.believed)

    @property
    def reads(self) -> list[str]:
        """Return which tensors of the model's result are read: `y`, `y[0]` or `y["name"]`."""
        spec = self._first.plan.captured.spec
        leaves, _ = pytree.tree_flatten_with_path(pytree.tree_unflatten(range(spec.num_leaves), spec))
        return [f"y{pytree.keystr(leaves[k][0])}" for k, _ in self._first.outputs]

    @property
    def conditions(self) -> list[str]:
        """Return the arguments that have to be given by name."""
        return list(dict.fromkeys(self._names[i] for i, _ in self._first.conditions))

    def forward(self, *given: Any, **conditions: Any) -> Any:
        """Return the model's inputs: one, or a tuple of those that are, or hold, tensors.

        Raises:
            TypeError: more or less is given than what `reads` and `conditions` name, or of other shapes.
        """
        outputs = self._read(given)
        solution = self._solution_for(outputs, conditions)
        leaves = dict(enumerate(pytree.tree_leaves((self._example[0], {**self._example[1], **conditions}))))
        env = dict(zip((v for _, v in solution.outputs), outputs, strict=True))
        env.update((v, leaves[i]) for i, v in solution.conditions)
        env.update((v, place.tensor()) for v, place in solution.plan.sources)
        for d in solution.order:
            if isinstance(d, Invert):
                env[d.arc.head] = d.arc.solve(*(env[v] for v in d.arc.tail))
            else:
                made = solution.plan.lowered.program.ops[d.op].outs
                env.update(zip(made, solution.plan.calls[d.op].invoke(env), strict=True))
        return self._put_together({i: env[v] for i, v in solution.inputs})

    # --- what is given and returned
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
        """Return the tensors that are read of the model's result, or of what stands for it."""
        found = list(given)
        if len(given) == 1:
            leaves, spec = pytree.tree_flatten(given[0])
            if spec == self._first.plan.captured.spec:
                found = [leaves[k] for k, _ in self._first.outputs]
        if len(found) != len(self._first.outputs) or not all(isinstance(t, Tensor) for t in found):
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
    @_torch.uncompiled
    def _solution_for(self, outputs: list[Tensor], conditions: Mapping[str, Any]) -> Solution:
        """Return the program for such tensors, like the example's but for the batch; new if that has changed."""
        args, known = self._example
        if not conditions.keys() <= known.keys() or not conditions.keys() >= {*self.conditions}:
            theirs = ", ".join(f"`{n}`" for n in self.conditions) or "none"
            raise TypeError(f"the inverse of {name_of(self.model)} takes these arguments by name: {theirs}.")
        values = self._first.plan.lowered.program.values
        same = all(values[v].shape == tuple(t.shape) for (_, v), t in zip(self._first.outputs, outputs, strict=True))
        rows = None if same or not outputs[0].dim() else outputs[0].shape[0]
        names = [n for n in conditions if key(conditions[n]) != key(known[n])]
        kind = None if rows is None and not names else (rows, tuple((n, key(conditions[n])) for n in names))
        found = self._solutions.get(kind)
        if found is None or found.plan.changed() is not None:
            size = next((t.shape[0] for t in pytree.tree_leaves(args) if isinstance(t, Tensor) and t.dim()), 0)
            if rows is not None:
                args = pytree.tree_map_only(
                    Tensor, lambda t: t.new_empty((rows, *t.shape[1:])) if t.shape[:1] == (size,) else t, args
                )
            found = self._solve(kind, args, {**known, **conditions})
        if [k for k, _ in found.outputs] != [k for k, _ in self._first.outputs]:
            raise TypeError(f"the inverse of {name_of(self.model)} would read other results for these conditions.")
        program = found.plan.lowered.program
        for (_, v), t in zip(found.outputs, outputs, strict=True):
            if tuple(program.values[v].shape) != tuple(t.shape):
                want = list(program.values[v].shape)
                raise TypeError(f"the inverse of {name_of(self.model)} was given {list(t.shape)}, not {want}.")
        return found

    def _solve(self, kind: Any, args: Any, kwargs: Any) -> Solution:
        names = self._names[: len(pytree.tree_leaves(args))]
        found = Solver(self.model, self.model.forward, args, kwargs, names).solve()
        if len(self._solutions) >= MOST_PROGRAMS:
            del self._solutions[next(iter(self._solutions))]
        self._solutions[kind] = found
        return found

    def _check(self, names: list[str]) -> None:
        """Try functions that are inverted by themselves once, on the example, as nobody else knows whether they are."""
        args, kwargs = self._example
        buffers = [(b, b.clone()) for b in self.model.buffers()]
        with torch.no_grad(), torch.random.fork_rng():
            back = pytree.tree_leaves(self(self.model(*args, **kwargs), **kwargs))
            for b, then in buffers:
                b.copy_(then)
        wanted = [t for t in pytree.tree_leaves(args) if isinstance(t, Tensor)]
        off = [float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in zip(back, wanted, strict=True)]
        if not all(error < MAX_ERROR for error in off):
            text = f"{', '.join(f'`{n}`' for n in names)}, told to invert, does not give the example back"
            raise NotReversibleError(f"`inverse`: {text}: it is off by {max(off):.0e}", names[0])

    def extra_repr(self) -> str:
        """Return the program, for `print`."""
        return self._first.code

    def __reduce__(self) -> Any:
        """Return how it is pickled and copied: as the model and the example; programs are found again."""
        return InverseModule, (self.model, *self._example)
