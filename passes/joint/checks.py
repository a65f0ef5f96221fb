"""What only a run can tell: flags that a joint graph computes, and one check at the end of its backward reads.

That a factor stayed away from zero, that rounding did not grow too much, that what was relied on still holds, that
values came back as they were.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from revfx.passes import _torch
from revfx.passes.cuts import Step
from revfx.passes.facts import Fact, check
from revfx.passes.grid import checksum, limit
from revfx.passes.joint.forward import BACKWARD, FORWARD
from revfx.passes.joint.record import Recorder
from revfx.passes.plan import GARBAGE, MARGIN, amplification, larger, precision, tolerance_of
from revfx.passes.program import Arc, Program
from revfx.passes.sizes import as_number


DRIFTED = (
    "revfx: a value regenerated in the backward differs from the forward's by more than 1 % (below {where}): rounding"
    " has grown too much; compile with options={{'anchor_every': 4}} or {{'unbounded': 'store'}}, which keep more, use"
    " a wider dtype for the streams, or compile this model with plain inductor"
)
OFF_GRID = (
    "revfx: grid: a value regenerated in the backward is not bit for bit the forward's (below {where}): the kernels of"
    " the backward do not round as those of the forward do; compile with options={{'inner': 'aot_eager'}}"
)
OTHER = (
    "revfx: a value regenerated in the backward is another than in the forward (below {where}): what is computed there"
    " depends on what has changed since, or its kernels are not deterministic"
)
JITTER = (
    "revfx: a value regenerated in the backward is rounded otherwise than in the forward (below {where}): a kernel"
    " there is not deterministic, or runs on another number of threads. Gradients are right up to such rounding"
)

SAMPLE = 64  # elements of each value

# The regenerated nodes of a cut's values, what they were computed back from, and where the cut lies.
Cut = tuple[Mapping[int, fx.Node], Mapping[int, int], str]


@dataclass(eq=False)
class Checks:
    """The checks of one joint graph; `kept` takes what must be saved, `attached` the flags to compute after a node."""

    joint: fx.Graph
    program: Program
    recorder: Recorder
    original: Callable[[int], fx.Node]
    tolerance: float | None
    lossless: bool

    def __post_init__(self) -> None:
        self.output = self.joint.output_node()
        self._first = next(n for n in self.joint.nodes if n.op != "placeholder")
        self.kept: set[fx.Node] = set()
        self.attached: dict[fx.Node, list[fx.Node]] = {}
        self.stretches: list[list[Cut]] = []
        self._flags: dict[fx.Node, tuple[str, _torch.Said]] = {}
        self._made: set[tuple[object, ...]] = set()  # of a node, and what is checked of it

    def guard(self, op: int, arc: Arc) -> None:
        own = self.original(int(arc.factor or 0))
        least = tolerance_of(self.program.values[arc.head].dtype, self.tolerance)
        if arc.least >= least or (own, arc.reciprocal, least) in self._made:
            return
        self._made.add((own, arc.reciprocal, least))
        where = self.program.ops[op].where
        message = (
            f"revfx: a factor of the coupling at {where} came nearer to 0 than {least:.0e}, so its input can't be "
            "computed back from its output; compile with options={'unbounded': 'store'} to keep such inputs"
        )
        self.check_forward(lambda c: ~(_nearest(c, arc.reciprocal) < least), [own], message)

    def limit_growth(self, steps: Sequence[Step]) -> None:
        """Raise, in every run, where factors that are data let rounding grow too much over steps between kept cuts."""
        arcs = [a for s in steps for a in s.arcs if a.measured]
        dtypes = {self.program.values[a.head].dtype for a in arcs}
        if not arcs:
            return
        eps = max(torch.finfo(d).eps for d in dtypes)
        most = max(tolerance_of(d, self.tolerance) for d in dtypes) / (MARGIN * eps)
        factors = {a.scaled_by: a for a in arcs}
        worst = {by: 1 / max(a.least, 1e-300) for by, a in factors.items()}
        if _grown(steps, worst) <= most:
            return
        sizes = [self.record(functools.partial(_mean_size, by), [self.original(v)]) for v, by in factors]
        where = self.program.ops[steps[0].start].where, self.program.ops[steps[-1].stop - 1].where
        message = (
            f"revfx: rounding grows too much where the couplings from {where[0]} to {where[1]} are computed back, as "
            "their factors come too near to 0; compile with options={'unbounded': 'store'} or {'anchor_every': 4}, "
            "which keep more, or use a wider dtype for the streams"
        )
        self.check_forward(lambda *t: _grown(steps, dict(zip(factors, t, strict=True))) <= most, sizes, message)

    def hold(self, op: int, value: int, fact: Fact) -> None:
        """Check in every run that a fact still holds of a value."""
        own = self.original(value)
        if (own, fact) not in self._made:
            self._made.add((own, fact))
            test, message = check(fact, own.name, self.program.ops[op].where)
            self.check_forward(test, [own], message)

    def compare(self, alive: Collection[fx.Node]) -> None:
        """Compare with the forward what is `alive` of the lowest cuts, where rounding has grown most."""
        for stretch in self.stretches:
            for cut, origins, where in reversed(stretch):
                read = {v: n for v, n in cut.items() if n in alive and precision(n.meta["val"].dtype) > 0}
                if read:
                    self._compare(read, origins, where)
                    break

    def _compare(self, cut: Mapping[int, fx.Node], origins: Mapping[int, int], where: str) -> None:
        off, bits = (OTHER if self.lossless else DRIFTED).format(where=where), JITTER.format(where=where)
        for v, now in cut.items():
            on_grid = self.program.values[v].grid is not None
            if on_grid or self.lossless:
                message = OFF_GRID.format(where=where) if on_grid else bits
                before = self.record(checksum, [self.original(v)])
                self._check_backward(lambda a, b: checksum(a) == b, now, [before], message, serious=on_grid)
            if not on_grid:
                samples = [self.record(_sample, [self.original(i)]) for i in (v, origins.get(v, v))]
                self._check_backward(lambda a, b, c: ~_drifted(_sample(a), b, c), now, samples, off)

    def check_ranges(self) -> None:
        """Check in every run that no value leaves the grid, and that all of those that lie on it are finite."""
        for v, value in enumerate(self.program.values):
            if value.grid is None:
                continue
            node, most = self.original(v), limit(value.dtype, value.grid)
            where = self.program.ops[self.program.made_at[v]].where
            message = (
                f"revfx: grid={value.grid}: a value at {where or 'an unknown place'} is not finite or not below "
                f"{most:.4g}, where a grid of steps 2^-{value.grid} has room in {value.dtype}; use a smaller `grid`, "
                "scale the activations down, or do without"
            )
            self.check_forward(lambda t, most=most: t.abs().amax() < most, [node], message)

    def record(self, by: Callable[..., Tensor], tail: Sequence[fx.Node], last: fx.Node | None = None) -> fx.Node:
        """Return the node of `by(*tail)` in the forward, right behind the `last` of the tail, and behind all inputs."""
        last = max(tail) if last is None else last
        with self.joint.inserting_before(self._first if last.op == "placeholder" else last.next):
            return self.recorder.record(by, tail, FORWARD, last)

    def check_forward(
        self, test: Callable[..., Tensor], tail: Sequence[fx.Node], message: str, serious: bool = True
    ) -> None:
        """Let the backward raise so, or warn, if a test of the forward's nodes, see `record`, gives false."""
        self._flags[self.record(test, tail)] = FORWARD, _torch.Said(message, serious)

    def _check_backward(
        self, test: Callable[..., Tensor], now: fx.Node, then: Sequence[fx.Node], message: str, serious: bool = True
    ) -> None:
        """Let the backward raise so, or warn, if a test of what is regenerated `now`, and kept `then`, gives false."""
        self.kept.update(then)
        with self.joint.inserting_before(self.output):
            ok = self.recorder.record(test, [now, *then], BACKWARD, now)
        self._flags[ok] = BACKWARD, _torch.Said(message, serious)
        self.attached.setdefault(now, []).append(ok)

    def raise_at_the_end(self) -> Iterator[fx.Node]:
        """Yield the checks, one for each device, that end the backward: no gradient is handed out before them.

        Those of the forward are made there too, so that nothing in it waits for a device.
        """
        flags = {n: (n.meta["val"].device, *self._flags[n]) for n in self.joint.nodes if n in self._flags}
        for device in dict.fromkeys(device for device, *_ in flags.values()):
            parts, texts = list[fx.Node](), list[_torch.Said]()
            for half in (FORWARD, BACKWARD):
                found = {n: said for n, (where, made, said) in flags.items() if (where, made) == (device, half)}
                if found:
                    with self.joint.inserting_before(self.output):
                        parts.append(self.recorder.record(lambda *t: torch.stack(t), [*found], half, next(iter(found))))
                    texts += found.values()
                    self.kept.update(parts if half == FORWARD else ())
            with self.joint.inserting_before(self.output):
                # a copy of what the forward saved, as the check is said to write it
                ok = self.recorder.record(lambda *t: torch.cat(t).clone(), parts, BACKWARD, parts[0])
                arguments = ok, [s.message for s in texts], [s.serious for s in texts]
                end = self.joint.call_function(torch.ops.revfx.check.default, arguments)
            end.meta.update(partitioner_tag=BACKWARD, val=None)
            yield end


def _grown(steps: Sequence[Step], measured: Mapping[tuple[int, bool], Any]) -> Any:
    """Return what a rounding error of 1 has grown to over some steps."""
    growth: dict[int, Any] = {}
    for step in steps:
        growth = amplification(step, growth, measured)
    return functools.reduce(larger, growth.values(), 1.0)


def _sample(t: Tensor) -> Tensor:
    """Return a copy of some elements of `t`, evenly spread over all its dimensions."""
    n = as_number(t.numel())
    stride = max(1, n // SAMPLE)
    while math.gcd(stride, n) > 1:  # else it might see one column only
        stride += 1
    return t.detach().reshape(-1)[::stride].clone()


def _drifted(now: Tensor, before: Tensor, image: Tensor) -> Tensor:
    """Return whether |now - before| > 1 % of the larger of |before| and |image|, what it was computed back from.

    A difference of two large numbers that is zero comes back as their rounding. Not where `before` was not finite.
    """
    error, scale = (now - before).norm(), before.norm()
    return ~(error <= GARBAGE * torch.maximum(scale, image.norm())) & torch.isfinite(scale)


def _mean_size(reciprocal: bool, c: Tensor) -> Tensor:
    """Return the root mean square of 1/|c|, or of |c| for a divisor: by what rounding grows, on average."""
    c = c.detach().to(torch.float64 if c.dtype == torch.float64 else torch.float32)
    return (c if reciprocal else c.reciprocal()).square().mean().sqrt()


def _nearest(c: Tensor, reciprocal: bool) -> Tensor:
    """Return the smallest magnitude of c, or of 1/c."""
    return c.abs().amax().reciprocal() if reciprocal else c.abs().amin()
