"""What checks of models stand on: regions that run forwards and are inverted by steps, gradients, ordinary storage."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from revfx import ambient
from revfx.arguments import normalize_arguments
from revfx.capture.data import held_at, steps_to
from revfx.capture.plan import call_of
from revfx.capture.trace import capture
from revfx.eager.regeneration import Regeneration
from revfx.eager.region_plan import Env, Watch, region_observer
from revfx.engine.call import UnitCall
from revfx.engine.match import Match
from revfx.engine.observe import Observer, observer
from revfx.engine.proof import prove
from revfx.errors import RevfxError
from revfx.passes.arcs import lower


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


class Originals(Watch):
    """Looks on while a region runs, and copies every value that it makes."""

    def __init__(self) -> None:
        self.values: Env = {}

    def made(self, run: Regeneration, value: int, tensor: Tensor) -> None:
        """Keep a copy."""
        self.values[value] = tensor.detach().clone()


def watched(watch: Callable[[Regeneration], Watch]) -> AbstractContextManager[None]:
    """Return a context in which every region that runs forwards gets a `watch`."""
    return ambient.given(region_observer, watch)


def directions(op: nn.Module, args: Any, kwargs: Mapping[str, Any] | None = None) -> dict[str, float]:
    """Return the relative error of solving one operation for each of its operands, by direction."""
    args, kwargs = normalize_arguments(args, kwargs)
    modules = dict(op.named_modules())
    captured = capture(op, op.forward, args, kwargs, frozenset())
    lowered = lower(captured.graph, modules.__getitem__, barred={})
    reasons = "; ".join(cause.text for o in lowered.program.ops for _, cause in o.refused) or "the rule yields nothing"
    if not any(o.arcs for o in lowered.program.ops[1:] or lowered.program.ops):  # the first only copies
        lowered = lower(captured.graph, modules.__getitem__)  # what only a code makes right
    program, leaves = lowered.program, pytree.tree_leaves((args, kwargs))
    env: Env = {i: leaves[at] for i, at in zip(lowered.inputs, captured.inputs, strict=True)}
    env |= {lowered.index[n]: held_at(modules[path], steps_to(name)) for n, (path, name) in captured.attributes.items()}
    for i, o in enumerate(program.ops):
        env.update(zip(o.outs, call_of(lowered, i, modules.__getitem__).invoke(env), strict=True))
    arcs = [a for o in (program.ops[1:] or program.ops) for a in o.arcs]
    arcs = [a for a in arcs if program.values[a.head].dtype == program.values[a.tail[0]].dtype or a.exact]
    if not arcs:
        raise RevfxError(f"`check_inverse`: no operand can be solved for: {reasons}")
    return {a.text: relative_error(a.solve(*(env[v] for v in a.tail)), env[a.head]) for a in arcs}


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
