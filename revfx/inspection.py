"""The measurements behind `revfx.testing` and `revfx.debug`: errors of inverses, and gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from itertools import chain, islice
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from revfx import ambient
from revfx.arguments import normalize_arguments
from revfx.engine.call import UnitCall
from revfx.engine.learn import Learning
from revfx.engine.match import Match
from revfx.engine.native import learner
from revfx.engine.observe import Observer, observer
from revfx.engine.proof import prove
from revfx.errors import RevfxError
from revfx.plan.couplings import lowered_tape
from revfx.plan.model import tensors_in
from revfx.plan.solve import compile_values


def relative_error(got: Tensor, want: Tensor) -> float:
    """Return |got - want| / |want| in fp64, or |got| if `want` is zero; NaN if either has a NaN."""
    g, w = got.detach().double(), want.detach().double()
    scale = w.norm().item()
    if scale == 0:
        return g.norm().item()
    return (g - w).norm().item() / scale


def round_trip(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, float]:
    """Return the relative error of each inverse, by its place, over all units that `model(*args, **kwargs)` runs.

    The model runs in its own dtype, and in fp64 on a copy, twice each: the first call is recorded.
    """
    errors = _measure_errors(model, args, kwargs)
    tensors = (*model.parameters(), *pytree.tree_leaves((args, kwargs)))
    if any(is_floating(t) and t.dtype != torch.float64 for t in tensors):
        errors.update(_measure_errors(copy.deepcopy(model).double(), *to_double((args, kwargs))))
    return errors


def _measure_errors(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, float]:
    errors = _InverseErrors()
    with torch.enable_grad(), torch.random.fork_rng(), ambient.set_variable(observer, errors):
        for _ in range(WARM_UP_CALLS + 1):
            model(*args, **kwargs)
    if not errors.found:
        raise RevfxError(
            f"`check_inverse`: no reversible region was run by this {type(model).__name__}, so nothing was inverted."
            " `revfx.explain` lists the reasons."
        )
    return errors.found


WARM_UP_CALLS = 1  # calls that a converted model records


class _InverseErrors(Observer):
    """The largest error of each inverse, measured whenever a unit ends."""

    def __init__(self) -> None:
        self.found: dict[str, float] = {}

    def completed(self, call: UnitCall, match: Match) -> None:
        """Compare the prediction of each code, and the entry as far as inverses give it without codes."""
        unit = call.unit
        if unit.backward is None:
            return
        entry = dict.fromkeys(unit.entry)
        for coded in unit.coded:
            tail = [match.operand(slot) for slot in coded.tail]
            self._add(f"{unit}: {coded.arc.text}", coded.arc.solve(*tail), match.operand(coded.head))
            entry.pop(coded.head, None)

        def check(slot: int, t: Tensor) -> None:
            if slot in entry and slot not in unit.kept and slot not in unit.exit:
                self._add(f"{unit}: tensor {slot}", t, match.operand(slot))

        if call.inverts:
            prove(unit.backward, call.inputs(unit.backward), check)

    def _add(self, name: str, got: Tensor, want: Tensor) -> None:
        name = f"{name}: {str(want.dtype).removeprefix('torch.')}"
        self.found[name] = max(self.found.get(name, 0.0), relative_error(got, want))


def to_double(tree: Any) -> Any:
    """Return nested arguments with their floating-point tensors in fp64, detached and with the same `requires_grad`."""
    return pytree.tree_map(lambda t: t.detach().double().requires_grad_(t.requires_grad) if is_floating(t) else t, tree)


def is_floating(t: Any) -> TypeGuard[Tensor]:
    """Return whether something is a tensor of floating-point numbers."""
    return isinstance(t, Tensor) and t.is_floating_point()


def direction_errors(op: nn.Module, args: Any, kwargs: Mapping[str, Any] | None = None) -> dict[str, float]:
    """Return the relative error of solving the operators of a module for their operands, by direction.

    The module's first operator only copies, and does not count if there are others. Directions that need a code are
    solved only if there is no other direction.
    """
    args, kwargs = normalize_arguments(args, kwargs)
    learning = learner(Learning)(op, tensors_in((args, kwargs)))
    with learning:
        out = op(*args, **kwargs)
    tape = learning.tape
    tape.returned = [learning.number(t) for t in tensors_in(out)]

    # The directions: arcs from operands that are known (tail) to the operand that is solved for (head).
    nodes, lowered = lowered_tape(tape, lossless=False, from_inputs=True)
    causes = [cause.text for _, cause in chain.from_iterable(o.refused for o in lowered.program.ops)]
    arcs = _arcs_of(lowered)
    if not arcs:
        nodes, lowered = lowered_tape(tape, lossless=True, from_inputs=True)
        arcs = _arcs_of(lowered)
    values = lowered.program.values
    arcs = [a for a in arcs if values[a.head].dtype == values[a.tail[0]].dtype or a.exact]
    if not arcs:
        reasons = "; ".join(causes) or "the rule yields nothing"
        raise RevfxError(f"`check_inverse`: no operand can be solved for: {reasons}")

    # All values of the arcs come from one run of the operators.
    wanted = chain.from_iterable((a.head, *a.tail) for a in arcs)
    run, outside = compile_values(tape, nodes, lowered, list(wanted))
    results = iter(run([learning.tensor(value) for value in outside]))
    found: dict[str, float] = {}
    for arc in arcs:
        head, *tail = islice(results, 1 + len(arc.tail))
        found[arc.text] = relative_error(arc.solve(*tail), head)
    return found


def _arcs_of(lowered: Any) -> list[Any]:
    """Return the arcs of all operations but the first, or of the first if it is the only one."""
    ops = lowered.program.ops
    return list(chain.from_iterable(o.arcs for o in ops[1:] or ops))


# --- gradients
def gradients(
    model: Callable[..., Any],
    args: Any,
    kwargs: Mapping[str, Any] | None = None,
    *,
    loss: Callable[[Any], Tensor] | None = None,
    seed: int = 0,
) -> dict[str, Tensor | None]:
    """Return, by name, the gradients of `loss(model(*args, **kwargs))` for parameters and inputs that require one.

    `.grad` is left untouched. Parameters of `torch.compile(model)` have the names that they have in `model`.

    Args:
        model: a module, or a function.
        args, kwargs: its arguments; see `normalize_arguments`.
        loss: from the output to a scalar; default: a sum of sines of all outputs.
        seed: of the random numbers.
    """
    leaves, spec = pytree.tree_flatten(normalize_arguments(args, kwargs))
    wanted: dict[str, Tensor] = {}
    for i, x in enumerate(leaves):
        if isinstance(x, Tensor):
            leaves[i] = x.detach().clone().requires_grad_(x.requires_grad)
            if x.requires_grad:
                wanted[f"input {i}"] = leaves[i]
    if isinstance(model, nn.Module):
        for name, p in model.named_parameters():
            if p.requires_grad:
                wanted[name.removeprefix("_orig_mod.")] = p  # the prefix of `torch.compile(model)`
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        positional, named = pytree.tree_unflatten(leaves, spec)
        value = (loss or _sum_of_sines)(model(*positional, **named))
        if not wanted:
            return {}
        return dict(zip(wanted, torch.autograd.grad(value, list(wanted.values()), allow_unused=True), strict=True))


def _sum_of_sines(output: Any) -> Tensor:
    leaves = [t for t in pytree.tree_leaves(output) if is_floating(t)]
    return sum((t.sin().sum() for t in leaves), torch.zeros(()))
