"""Checks in a run: flags that a joint graph computes, and one check at the end of its backward.

That a factor stayed away from zero, that rounding did not grow too much, that what was relied on still holds, that
values came back as they were.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from revfx.passes import _torch
from revfx.passes.facts import Fact, check
from revfx.passes.joint.forward import BACKWARD, FORWARD
from revfx.passes.joint.record import Recorder
from revfx.passes.program import Program
from revfx.passes.rounding import MAX_ERROR, precision
from revfx.passes.sizes import as_number


DRIFTED = (
    "revfx: a value regenerated in the backward differs from the forward's by more than 1 % (below {where}): rounding"
    " has grown too much. Use a wider dtype for the streams, `options={{'inner': 'aot_eager'}}`, which does not round,"
    " or plain inductor for this model"
)
OTHER = (
    "revfx: a value regenerated in the backward is another than in the forward (below {where}): it depends on state"
    " that has changed since, or its kernels are not reproducible. Its gradients would be wrong. Make it depend on its"
    " inputs alone, or compile this model with plain inductor"
)
JITTER = (
    "revfx: a value regenerated in the backward differs from the forward's by rounding (below {where}): a kernel there"
    " is not reproducible, or runs on another number of threads. Gradients are accurate to this rounding. Call"
    " `torch.use_deterministic_algorithms(True)`, or compile this model with plain inductor"
)

SAMPLE = 64  # elements of each value

# The regenerated nodes of a cut's values, their sources, and the place of the cut.
Cut = tuple[Mapping[int, fx.Node], Mapping[int, int], str]


@dataclass(eq=False)
class Checks:
    """The checks of one joint graph; `kept`: nodes that must be saved, `attached`: flags to compute after a node."""

    joint: fx.Graph
    program: Program
    recorder: Recorder
    original: Callable[[int], fx.Node]
    lossless: bool

    def __post_init__(self) -> None:
        self.output = self.joint.output_node()
        self._first = next(n for n in self.joint.nodes if n.op != "placeholder")
        self.kept: set[fx.Node] = set()
        self.attached: dict[fx.Node, list[fx.Node]] = {}
        self.stretches: list[list[Cut]] = []
        self._flags: dict[fx.Node, tuple[str, _torch.Said]] = {}
        self._made: set[tuple[object, ...]] = set()  # of a node, and its check

    def hold(self, op: int, value: int, fact: Fact) -> None:
        """Check in every run that a fact still holds of a value."""
        own = self.original(value)
        if (own, fact) not in self._made:
            self._made.add((own, fact))
            test, message = check(fact, own.name, self.program.ops[op].where)
            self.check_forward(test, [own], message)

    def compare(self, alive: Collection[fx.Node]) -> None:
        """Compare the `alive` values of the lowest cuts, where rounding has grown most, with the forward's."""
        for stretch in self.stretches:
            for cut, origins, where in reversed(stretch):
                read = {v: n for v, n in cut.items() if n in alive and precision(n.meta["val"].dtype) > 0}
                if read:
                    self._compare(read, origins, where)
                    break

    def _compare(self, cut: Mapping[int, fx.Node], origins: Mapping[int, int], where: str) -> None:
        off, bits = (OTHER if self.lossless else DRIFTED).format(where=where), JITTER.format(where=where)
        for v, now in cut.items():
            if self.lossless:
                before = self.record(_checksum, [self.original(v)])
                self._check_backward(lambda a, b: _checksum(a) == b, now, [before], bits, serious=False)
            samples = [self.record(_sample, [self.original(i)]) for i in (v, origins.get(v, v))]
            self._check_backward(lambda a, b, c: ~_drifted(_sample(a), b, c), now, samples, off)

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


def _checksum(t: Tensor) -> Tensor:
    """An int64 that differs, but for chance, where any bit or the order does; zeros of either sign agree."""
    t = t.detach() + 0.0
    t = torch.view_as_real(t) if t.is_complex() else t
    bits = t.reshape(-1).view({8: torch.int64, 4: torch.int32, 2: torch.int16}[t.element_size()]).to(torch.int64)
    return (bits * (2 * torch.arange(bits.numel(), device=bits.device) + 1)).sum()


def _sample(t: Tensor) -> Tensor:
    """Return a copy of some elements of `t`, evenly spread over all its dimensions."""
    n = as_number(t.numel())
    stride = max(1, n // SAMPLE)
    while math.gcd(stride, n) > 1:  # else it might see one column only
        stride += 1
    return t.detach().reshape(-1)[::stride].clone()


def _drifted(now: Tensor, before: Tensor, image: Tensor) -> Tensor:
    """Return whether |now - before| > 1 % of the larger of |before| and |image|, its source.

    A difference of two large numbers that is zero comes back as their rounding. Not where `before` was not finite.
    """
    error, scale = (now - before).norm(), before.norm()
    return ~(error <= MAX_ERROR * torch.maximum(scale, image.norm())) & torch.isfinite(scale)
