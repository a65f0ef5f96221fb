"""The base of checks of models: regions that run forwards and are inverted by steps, gradients, ordinary storage."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
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
from revfx.plan.solve import computed


def relative_error(got: Tensor, want: Tensor) -> float:
    """Return |got - want| / |want| in fp64 (the norm of `got` where `want` is zero); NaN where either has a NaN."""
    g, w = got.detach().double(), want.detach().double()
    scale = w.norm().item()
    return ((g - w).norm().item() / scale) if scale else g.norm().item()


def round_trip(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, float]:
    """Return the relative error of each inverse, by its place, over all units that `model(*args, **kwargs)` runs.

    The model runs in its own dtype, and in fp64 on a copy; twice each, as the first call learns.
    """
    errors = _errors_of(model, args, kwargs)
    floating = [t for t in (*model.parameters(), *pytree.tree_leaves((args, kwargs))) if is_floating(t)]
    if any(t.dtype != torch.float64 for t in floating):
        errors.update(_errors_of(copy.deepcopy(model).double(), *doubled((args, kwargs))))
    return errors


def _errors_of(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, float]:
    errors = _Errors()
    with torch.enable_grad(), torch.random.fork_rng(), ambient.given(observer, errors):
        for _ in range(WARM_UP_CALLS + 1):
            model(*args, **kwargs)
    if not errors.found:
        raise RevfxError(
            f"`check_inverse`: no reversible region was run by this {type(model).__name__}, so nothing was inverted."
            " `revfx.explain` lists the reasons."
        )
    return errors.found


WARM_UP_CALLS = 1  # that a converted model learns from


class _Errors(Observer):
    """Solves each inverse of a unit as it ends, and compares."""

    def __init__(self) -> None:
        self.found: dict[str, float] = {}

    def completed(self, call: UnitCall, match: Match) -> None:
        """Compare the prediction of each code, and, without codes, the entry that going backwards gives."""
        unit = call.unit
        if unit.backward is None:
            return
        for coded in unit.coded:
            x = match.operand(coded.head)
            predicted = coded.arc.solve(*(match.operand(s) for s in coded.tail))
            self._note(f"{unit}: {coded.arc.text}", predicted, x)
        entry = dict.fromkeys(unit.entry)
        for coded in unit.coded:
            entry.pop(coded.head, None)

        def check(slot: int, t: Tensor) -> None:
            if slot in entry and slot not in unit.kept and slot not in unit.exit:
                self._note(f"{unit}: tensor {slot}", t, match.operand(slot))

        if call.inverts:
            prove(unit.backward, call.inputs(unit.backward), check)

    def _note(self, name: str, got: Tensor, want: Tensor) -> None:
        name = f"{name}: {str(want.dtype).removeprefix('torch.')}"
        self.found[name] = max(self.found.get(name, 0.0), relative_error(got, want))


def doubled(tree: Any) -> Any:
    """Return nested arguments with their floating-point tensors in fp64, as leaves that need a gradient as before."""
    return pytree.tree_map(lambda t: t.detach().double().requires_grad_(t.requires_grad) if is_floating(t) else t, tree)


def is_floating(t: Any) -> TypeGuard[Tensor]:
    """Return whether something is a tensor of floating-point numbers."""
    return isinstance(t, Tensor) and t.is_floating_point()


def directions(op: nn.Module, args: Any, kwargs: Mapping[str, Any] | None = None) -> dict[str, float]:
    """Return the relative error of solving the operators of a module for their operands, by direction.

    The first one only copies. What only a code makes right is solved where there is nothing else.
    """
    args, kwargs = normalize_arguments(args, kwargs)
    learning = learner(Learning)(op, tensors_in((args, kwargs)))
    with learning:
        out = op(*args, **kwargs)
    tape = learning.tape
    tape.returned = [learning.number(t) for t in tensors_in(out)]
    of, lowered = lowered_tape(tape, lossless=False, from_inputs=True)
    ops = lowered.program.ops
    reasons = "; ".join(cause.text for o in ops for _, cause in o.refused) or "the rule yields nothing"
    if not any(o.arcs for o in ops[1:] or ops):
        of, lowered = lowered_tape(tape, lossless=True, from_inputs=True)
    values, arcs = lowered.program.values, [a for o in lowered.program.ops[1:] or lowered.program.ops for a in o.arcs]
    arcs = [a for a in arcs if values[a.head].dtype == values[a.tail[0]].dtype or a.exact]
    if not arcs:
        raise RevfxError(f"`check_inverse`: no operand can be solved for: {reasons}")
    run, outside = computed(tape, of, lowered, [v for a in arcs for v in (a.head, *a.tail)])
    found: dict[str, float] = {}
    results = iter(run([learning.tensor(value) for value in outside]))
    for arc in arcs:
        head, *tail = (next(results) for _ in (arc.head, *arc.tail))
        found[arc.text] = relative_error(arc.solve(*tail), head)
    return found


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

    Random numbers are drawn from `seed`; the default loss is a sum of sines of all outputs. `.grad` is left untouched.
    Parameters of `torch.compile(model)` have the names that they have in `model`.
    """
    leaves, spec = pytree.tree_flatten(normalize_arguments(args, kwargs))
    fresh = [x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in leaves]
    wanted = {f"input {i}": x for i, x in enumerate(fresh) if isinstance(x, Tensor) and x.requires_grad}
    if isinstance(model, nn.Module):
        named = model.named_parameters()
        wanted |= {n.removeprefix("_orig_mod."): p for n, p in named if p.requires_grad}  # of `torch.compile(model)`
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        given, named = pytree.tree_unflatten(fresh, spec)
        value = (loss or _sine)(model(*given, **named))
        if not wanted:
            return {}
        return dict(zip(wanted, torch.autograd.grad(value, list(wanted.values()), allow_unused=True), strict=True))


def _sine(output: Any) -> Tensor:
    leaves = [t for t in pytree.tree_leaves(output) if is_floating(t)]
    return sum((t.sin().sum() for t in leaves), torch.zeros(()))
