"""How far regenerated activations drift: one inverse pass, compared layer by layer with what the forward made."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from revfx.eager.regeneration import Regeneration
from revfx.eager.region_plan import Env
from revfx.errors import RevfxError
from revfx.inspection import doubled, gradients as gradients_of, originals_of, relative_error, stored
from revfx.report.figures import figure


@dataclass(frozen=True)
class StepDrift:
    """The relative error of one value of the cut before step `number`, regenerated from the nearest kept cut above.

    `region` and `number` count in program order; `kept` says that the cut is kept, so that there is nothing to be off.
    """

    region: int
    number: int
    where: str
    name: str
    dtype: torch.dtype
    error: float
    kept: bool = False


@dataclass(frozen=True)
class GradientDrift:
    """The relative error of one gradient against plain autograd's, and both against those of the model in fp64."""

    name: str
    error: float
    plain_to_fp64: float
    to_fp64: float


@dataclass(frozen=True)
class Drift:
    """What `drift` measured; print it for a table."""

    steps: tuple[StepDrift, ...]
    gradients: tuple[GradientDrift, ...] = ()

    @property
    def worst(self) -> float:
        """The largest relative error of any regenerated value; 0 where none is regenerated."""
        return max((s.error for s in self.steps), default=0.0)

    def __str__(self) -> str:
        lines = [f"{'step':>8}  {'error':>8}  {'dtype':<8}  value"]
        for s in self.steps:
            error = "kept" if s.kept else f"{s.error:.1e}"
            dtype = str(s.dtype).removeprefix("torch.")
            lines.append(f"{f'{s.region}.{s.number}':>8}  {error:>8}  {dtype:<8}  {s.name}  {s.where}")
        if self.gradients:
            lines.append("   error      fp64     plain  gradient (error to plain's; to fp64; plain's to fp64)")
            lines.extend(f"{g.error:8.1e}  {g.to_fp64:8.1e}  {g.plain_to_fp64:8.1e}  {g.name}" for g in self.gradients)
        return "\n".join(lines)

    def plot(self, path: str | Path) -> None:
        """Draw the errors over the steps, from the last to the first, into a file of the kind that `path` ends in."""
        fig = figure("`Drift.plot`", 7, 4)
        axes = fig.add_subplot(xlabel="step, from the last one to the first", yscale="log")
        axes.set_ylabel("relative error of the regenerated value")
        for region in sorted({s.region for s in self.steps}):
            worst: dict[int, float] = {}
            for s in (s for s in self.steps if s.region == region):
                worst[s.number] = max(worst.get(s.number, 0.0), s.error)
            axes.plot(list(worst), [e or float("nan") for e in worst.values()], ".-", label=f"region {region}")
        axes.invert_xaxis()
        axes.legend()
        fig.savefig(path)


def drift(
    model: Callable[..., Any], *inputs: Any, gradients: bool = False, loss: Callable[[Any], Tensor] | None = None
) -> Drift:
    """Measure how far every regenerated value of `model(*inputs)` is off, and on request every gradient.

    A module is copied first, so its buffers stay as they are; random numbers are put back. All values are held a while.

    Args:
        model: a converted model, a `RevBlock`, or a function that calls `rev_block`.
        inputs: its arguments.
        gradients: also compare gradients with those of ordinary storage, and both with those of a module in fp64.
        loss: from the output to a scalar, for the gradients; default a sum of sines of all outputs.

    Raises:
        RevfxError: no reversible region was run.
    """
    module = model if isinstance(model, nn.Module) else None
    if gradients and module is None:
        raise RevfxError("`drift(gradients=True)` also runs the model in fp64, so it needs a module, not a function.")
    with torch.random.fork_rng():
        runs = originals_of(model if module is None else copy.deepcopy(module), inputs, "drift")
        steps = [s for number, (run, originals) in enumerate(runs) for s in _of_region(number, run, originals)]
    return Drift(tuple(steps), _of_gradients(module, inputs, loss) if gradients and module is not None else ())


def _of_region(region: int, run: Regeneration, originals: Env) -> Iterator[StepDrift]:
    """Yield the drift of each value of each cut, the last cut first."""
    known: Env = {}
    for number in range(len(run.region.steps) - 1, -1, -1):
        step, kept = run.region.steps[number], number in run.kept_cuts
        known = run.invert(number, run.kept_cuts.get(number + 1, known))
        for v in run.kept_cuts[number] if kept else known:
            value, t = run.program.values[v], originals[v]
            if t.is_floating_point() or t.is_complex():
                error = 0.0 if kept else relative_error(known[v], t)
                where = run.program.ops[step.start].where
                yield StepDrift(region, number, where, value.name, t.dtype, error, kept)


def _of_gradients(
    model: nn.Module, inputs: Sequence[Any], loss: Callable[[Any], Tensor] | None
) -> tuple[GradientDrift, ...]:
    ours = gradients_of(copy.deepcopy(model), inputs, loss)
    plain = gradients_of(stored(copy.deepcopy(model)), inputs, loss)
    exact = gradients_of(stored(copy.deepcopy(model).double()), doubled(list(inputs)), loss)
    return tuple(
        GradientDrift(name, relative_error(got, p), relative_error(p, e), relative_error(got, e))
        for name, got in ours.items()
        if got is not None and (p := plain[name]) is not None and (e := exact[name]) is not None
    )
