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
from revfx.plan.model import run_plainly_inside, tensors_in
from revfx.plan.solve import RecordedForward, Solution, solve


MAX_PROGRAMS = 32  # programs of one inverse, for batch sizes and conditions; beyond, the oldest one is dropped
_EXAMPLE = (None, ())  # the batch size and the conditions of the example


def inverse(model: nn.Module, args: Any, kwargs: Mapping[str, Any] | None = None) -> InverseModule:
    """Infer the inverse of a model, as a module: `inverse(model, x)(model(x))` is `x`, up to rounding.

    The inverse shares the model's parameters and is differentiable with respect to them and to its inputs. It prints as
    its program: inverses of the model's operations in reverse order, and its functions unchanged. Functions that draw
    random numbers (dropout in training mode) can't be recomputed: call `model.eval()` first.

    Call the inverse with the model's result, or only with the tensors that it reads (`reads` names them). A flow's
    inverse, for example, reads the latent variable without its log-determinant. Give conditions by name; a condition
    that is not a tensor defaults to that of the example.

    Args:
        model: any module; a converted one counts as its original. Its forward runs once on the example. It runs again
            for other batch sizes, and when numbers in its modules have changed.
        args: example inputs, which the inverse returns: a tensor, or a tuple of positional arguments.
        kwargs: example conditions, such as a context, which the inverse takes by name.

    Raises:
        NotReversibleError: an input does not follow from the outputs; the text names it, with the reason. No step
            iterates to a fixed point, or solves for one element after the other.
        TypeError: `model` is not a module, or `args` is neither a tensor nor a tuple.
    """
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"`inverse` takes an nn.Module, not a {type(model).__name__}.")
    return InverseModule(unconverted(model), *normalize_arguments(args, kwargs))


@dataclass(frozen=True)
class _SolvedCase:
    """The inverse for one batch size, and for some conditions.

    Attributes:
        solution: the inverse.
        spec: the structure of the model's result.
        outside: functions that return the model's tensors that the inverse reads.
        versions: the untrained ones among `outside`, each with its id and its version when the case was solved.
        state: the attributes of the model's modules besides tensors.
    """

    solution: Solution
    spec: pytree.TreeSpec
    outside: tuple[Callable[[], Tensor], ...]
    versions: tuple[tuple[Callable[[], Tensor], int, int], ...]
    state: Any

    def is_current(self, state: Any) -> bool:
        """Return whether the model's state, and its untrained tensors, have not changed."""
        same = all(id(get()) == number and _torch.version(get()) == version for get, number, version in self.versions)
        return same and self.state == state


class InverseModule(nn.Module):
    """The inverse of a model, for tensors with the shapes of its examples; see `inverse`."""

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = model
        self._example = pytree.tree_map_only(Tensor, lambda t: t.detach(), (args, dict(kwargs)))
        self._cases: dict[Any, _SolvedCase] = {}
        self._first = self._solve(_EXAMPLE, *self._example)
        if self._first.solution.believed:
            self._check(self._first.solution.believed)

    @property
    def reads(self) -> list[str]:
        """The tensors of the model's result that the inverse reads: `y`, `y[0]` or `y["name"]`."""
        spec = self._first.spec
        leaves, _ = pytree.tree_flatten_with_path(pytree.tree_unflatten(range(spec.num_leaves), spec))
        return [f"y{pytree.keystr(leaves[k][0])}" for k in self._first.solution.reads]

    @property
    def conditions(self) -> list[str]:
        """The arguments that have to be given by name."""
        return list(dict.fromkeys(self._names[i] for i in self._first.solution.conditions))

    def forward(self, *outputs: Any, **conditions: Any) -> Any:
        """Return the model's inputs: one, or a tuple of those that are, or hold, tensors.

        Raises:
            TypeError: tensors or conditions are missing, superfluous, or of other shapes than the example's.
        """
        tensors = self._select_outputs(outputs)
        case = self._find_case(tensors, conditions)
        solution = case.solution
        leaves = pytree.tree_leaves((self._example[0], {**self._example[1], **conditions}))
        tensors += [leaves[i] for i in solution.conditions]
        tensors += [get() for get in case.outside]
        return self._assemble_inputs(dict(zip(solution.inputs, solution.run(tensors), strict=True)))

    # --- arguments and results
    @functools.cached_property
    def _names(self) -> list[str]:
        """For each leaf of the example, the name of its argument in the model's forward."""
        args, kwargs = self._example
        parameters = inspect.signature(self.model.forward).parameters.values()
        names = [p.name for p in parameters if p.kind < p.VAR_POSITIONAL]
        names += [f"input {k}" for k in range(len(names), len(args))]
        found: list[str] = []
        for name, value in (*zip(names, args, strict=False), *kwargs.items()):
            found += [name] * len(pytree.tree_leaves(value))
        return found

    def _select_outputs(self, outputs: tuple[Any, ...]) -> list[Tensor]:
        """Return the tensors to read, from the model's result or from these tensors themselves."""
        found = list(outputs)
        reads = self._first.solution.reads
        if len(outputs) == 1:
            leaves, spec = pytree.tree_flatten(outputs[0])
            if spec == self._first.spec:
                found = [leaves[k] for k in reads]
        if len(found) != len(reads) or not all(isinstance(t, Tensor) for t in found):
            raise TypeError(
                f"the inverse of {name_of(self.model)} takes the result of the model, or only {', '.join(self.reads)}."
            )
        return found

    def _assemble_inputs(self, tensors: Mapping[int, Tensor]) -> Any:
        """Return the example's arguments with these leaves, without arguments that hold no tensor."""
        args, _ = self._example
        leaves, spec = pytree.tree_flatten(args)
        inputs = pytree.tree_unflatten([tensors.get(i, leaf) for i, leaf in enumerate(leaves)], spec)
        inputs = tuple(filter(_has_tensor, inputs))
        return inputs[0] if len(inputs) == 1 else inputs

    # --- programs, by batch size and conditions
    @_torch.breaks_graph
    def _find_case(self, outputs: list[Tensor], conditions: Mapping[str, Any]) -> _SolvedCase:
        """Find the inverse for a batch size and conditions; solve for it if it is new, or if the model has changed."""
        args, example = self._example
        if not conditions.keys() <= example.keys() or not conditions.keys() >= {*self.conditions}:
            required = ", ".join(f"`{n}`" for n in self.conditions) or "none"
            raise TypeError(f"the inverse of {name_of(self.model)} takes these arguments by name: {required}.")

        # The example's batch size and conditions do not count.
        batch_size: int | None = None
        shapes = tuple(tuple(t.shape) for t in outputs)
        if shapes != self._first.solution.shapes and outputs[0].dim():
            batch_size = outputs[0].shape[0]
        changed: list[Any] = []
        for name, value in conditions.items():
            if content(value) != content(example[name]):
                changed.append((name, content(value)))
        key = batch_size, tuple(changed)
        case = self._cases.get(key)
        if case is None or not case.is_current(_state_of(self.model)):
            if batch_size is not None:
                args = _resize_batch(args, batch_size)
            case = self._solve(key, args, {**example, **conditions})

        # The new program has to read the same tensors as the first one.
        if case.solution.reads != self._first.solution.reads:
            raise TypeError(f"the inverse of {name_of(self.model)} would read other results for these conditions.")
        for want, got in zip(case.solution.shapes, shapes, strict=True):
            if want != got:
                raise TypeError(f"the inverse of {name_of(self.model)} was given {list(got)}, not {list(want)}.")
        return case

    def _solve(self, key: Any, args: Any, kwargs: Any) -> _SolvedCase:
        """Run the model's forward once, and find its inverse."""
        learning = learner(Learning)(self.model, tensors_in((args, kwargs)))
        with torch.enable_grad(), undisturbed(self.model), run_plainly_inside(), learning, CallObserver(learning):
            out = self.model(*args, **kwargs)

        # Leaves of arguments and results, as values of the tape.
        results, spec = pytree.tree_flatten(out)
        outputs = _number_tensors(learning, results)
        learning.tape.returned = list(outputs.values())
        arguments = _number_tensors(learning, pytree.tree_leaves((args, kwargs)))
        input_count = len(pytree.tree_leaves(args))
        inputs = {i: value for i, value in arguments.items() if i < input_count}
        conditions = {i: value for i, value in arguments.items() if i >= input_count}
        solution = solve(RecordedForward(learning.tape, inputs, conditions, outputs, self._names), name_of(self.model))

        # The inverse reads the current parameters and buffers, not those of this run.
        getters = _tensor_getters(self.model)
        outside: list[Callable[[], Tensor]] = []
        for value in solution.outside:
            t = learning.tensor(value)
            assert t is not None  # the model holds it
            outside.append(getters.get(id(t)) or functools.partial(_itself, t))
        versions = [(get, id(get()), _torch.version(get())) for get in outside if not get().requires_grad]
        case = _SolvedCase(solution, spec, tuple(outside), tuple(versions), _state_of(self.model))
        if len(self._cases) >= MAX_PROGRAMS:
            del self._cases[next(iter(self._cases))]
        self._cases[key] = case
        return case

    def _check(self, names: Sequence[str]) -> None:
        """Test the inverse on the example, as the declarations of these calls as invertible may be wrong."""
        args, kwargs = self._example
        with torch.no_grad(), undisturbed(self.model):
            got = pytree.tree_leaves(self(self.model(*args, **kwargs), **kwargs))
        want = [t for t in pytree.tree_leaves(args) if isinstance(t, Tensor)]
        errors = [float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in zip(got, want, strict=True)]
        if not all(error < MAX_ERROR for error in errors):
            calls = ", ".join(f"`{n}`" for n in names)
            text = f"{calls}, declared to be invertible, does not return the example"
            raise NotReversibleError(f"`inverse`: {text}: it is off by {max(errors):.0e}", names[0])

    def extra_repr(self) -> str:
        """Return the program, for `print`."""
        return self._first.solution.code

    def __reduce__(self) -> Any:
        """Pickle and copy the model and the example, but no programs."""
        return InverseModule, (self.model, *self._example)


def _itself(t: Tensor) -> Tensor:
    return t


def _has_tensor(tree: Any) -> bool:
    return any(isinstance(t, Tensor) for t in pytree.tree_leaves(tree))


def _number_tensors(learning: Learning, leaves: Sequence[Any]) -> dict[int, int]:
    """Return, by the index of each tensor among the leaves, its value on the tape."""
    return {i: learning.number(t) for i, t in enumerate(leaves) if isinstance(t, Tensor)}


def _tensor_getters(model: nn.Module) -> dict[int, Callable[[], Tensor]]:
    """Return, by the id of each parameter and buffer, a function that returns the current one."""
    found: dict[int, Callable[[], Tensor]] = {}
    for module in model.modules():
        for name, t in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            found[id(t)] = functools.partial(getattr, module, name)
    return found


def _resize_batch(args: Any, batch_size: int) -> Any:
    """Return arguments of another batch size, by repeating or dropping rows of the example."""
    rows: int | None = None  # of the first tensor
    for leaf in pytree.tree_leaves(args):
        if isinstance(leaf, Tensor) and leaf.dim():
            rows = leaf.shape[0]
            break

    def resize(t: Tensor) -> Tensor:
        if rows and t.shape[:1] == (rows,):
            return t[torch.arange(batch_size, device=t.device) % rows]
        return t

    return pytree.tree_map_only(Tensor, resize, args)


def _state_of(model: nn.Module) -> Any:
    """Return the attributes of a model's modules besides tensors, to compare."""
    return [(id(module), attributes(module)) for module in model.modules()]
