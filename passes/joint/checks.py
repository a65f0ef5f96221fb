"""Checks in a run: flags that a joint graph computes, and one check of them at the end of its backward.

A flag says that a fact still holds, that a code had room for all corrections, or that a regenerated value matches the
forward's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from revfx.passes import _torch
from revfx.passes.facts import Fact, make_fact_check
from revfx.passes.joint.forward import BACKWARD, FORWARD, first_operation
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
    "revfx: a value regenerated in the backward does not match the forward's (below {where}): it depends on state that"
    " has changed since, or its kernels are not reproducible. Its gradients would be wrong. Make it depend on its"
    " inputs alone, or compile this model with plain inductor"
)
JITTER = (
    "revfx: a value regenerated in the backward differs from the forward's by rounding (below {where}): a kernel there"
    " is not reproducible, or runs on another number of threads. Gradients are accurate to this rounding. Call"
    " `torch.use_deterministic_algorithms(True)`, or compile this model with plain inductor"
)

SAMPLE_ELEMENTS = 64  # of each value

# The regenerated nodes of a cut's values, the values that inverses computed them from, and the place of the cut.
Cut = tuple[Mapping[int, fx.Node], Mapping[int, int], str]


@dataclass(eq=False)
class Checks:
    """The checks of one joint graph.

    Attributes:
        joint, program, recorder: the graph, its program, and the recorder for it.
        original: returns the forward's node for a value.
        lossless: regenerated values have the bits of the forward.
        kept: nodes that must be saved.
        attached: flags to compute right after a node.
        stretches: the regenerated cuts between two kept ones, the last cut first.
    """

    joint: fx.Graph
    program: Program
    recorder: Recorder
    original: Callable[[int], fx.Node]
    lossless: bool

    def __post_init__(self) -> None:
        self.output: fx.Node = self.joint.output_node()
        self._first = first_operation(self.joint)
        self.kept: set[fx.Node] = set()
        self.attached: dict[fx.Node, list[fx.Node]] = {}
        self.stretches: list[list[Cut]] = []
        self._flags: dict[fx.Node, tuple[str, _torch.CheckMessage]] = {}  # with the half that computes them
        self._checked_facts: set[tuple[fx.Node, Fact]] = set()

    def check_fact(self, op: int, value: int, fact: Fact) -> None:
        """Check in every run that a fact about a value, on which operation `op` relies, still holds."""
        node = self.original(value)
        if (node, fact) not in self._checked_facts:
            self._checked_facts.add((node, fact))
            test, message = make_fact_check(fact, node.name, self.program.ops[op].where)
            self.check_forward(test, [node], message)

    def compare(self, alive: Collection[fx.Node]) -> None:
        """Compare `alive` values of each stretch's lowest cut, where rounding has grown most, with the forward's."""
        for stretch in self.stretches:
            for cut, origins, where in reversed(stretch):
                read: dict[int, fx.Node] = {}
                for v, node in cut.items():
                    if node in alive and precision(node.meta["val"].dtype) > 0:
                        read[v] = node
                if read:
                    self._compare(read, origins, where)
                    break

    def _compare(self, cut: Mapping[int, fx.Node], origins: Mapping[int, int], where: str) -> None:
        drifted = (OTHER if self.lossless else DRIFTED).format(where=where)
        rounded = JITTER.format(where=where)
        for v, now in cut.items():
            if self.lossless:
                checksum = self.record(_checksum, [self.original(v)])
                self._check_backward(lambda a, b: _checksum(a) == b, now, [checksum], rounded, serious=False)
            before = self.record(_sample, [self.original(v)])
            origin = self.record(_sample, [self.original(origins.get(v, v))])
            self._check_backward(lambda a, b, c: ~_has_drifted(_sample(a), b, c), now, [before, origin], drifted)

    def record(
        self, function: Callable[..., Tensor], operands: Sequence[fx.Node], last: fx.Node | None = None
    ) -> fx.Node:
        """Record a function of nodes in the forward, right after the `last` of them and after all placeholders."""
        if last is None:
            last = max(operands)
        with self.joint.inserting_before(self._first if last.op == "placeholder" else last.next):
            return self.recorder.record(function, operands, FORWARD, last)

    def check_forward(
        self, test: Callable[..., Tensor], operands: Sequence[fx.Node], message: str, serious: bool = True
    ) -> None:
        """Let the backward raise or, if not `serious`, warn if a test of nodes of the forward fails."""
        self._flags[self.record(test, operands)] = FORWARD, _torch.CheckMessage(message, serious)

    def _check_backward(
        self, test: Callable[..., Tensor], now: fx.Node, then: Sequence[fx.Node], message: str, serious: bool = True
    ) -> None:
        """Let the backward raise or warn if a test of a regenerated node `now` and saved nodes `then` fails."""
        self.kept.update(then)
        with self.joint.inserting_before(self.output):
            ok = self.recorder.record(test, [now, *then], BACKWARD, now)
        self._flags[ok] = BACKWARD, _torch.CheckMessage(message, serious)
        self.attached.setdefault(now, []).append(ok)

    def add_final_checks(self) -> list[fx.Node]:
        """Add one check of the flags for each device at the end of the backward, before any gradient is returned.

        Flags of the forward are checked there too, so that nothing in the forward waits for a device.
        """
        by_device: dict[torch.device, dict[str, dict[fx.Node, _torch.CheckMessage]]] = {}
        for node in self.joint.nodes:
            if node in self._flags:
                half, said = self._flags[node]
                halves = by_device.setdefault(node.meta["val"].device, {FORWARD: {}, BACKWARD: {}})
                halves[half][node] = said
        return list(map(self._add_final_check, by_device.values()))

    def _add_final_check(self, halves: Mapping[str, Mapping[fx.Node, _torch.CheckMessage]]) -> fx.Node:
        parts: list[fx.Node] = []
        said: list[_torch.CheckMessage] = []
        for half, flags in halves.items():
            if not flags:
                continue
            with self.joint.inserting_before(self.output):
                part = self.recorder.record(lambda *t: torch.stack(t), [*flags], half, next(iter(flags)))
            parts.append(part)
            if half == FORWARD:
                self.kept.add(part)
            said += flags.values()
        with self.joint.inserting_before(self.output):
            # The operator is declared to write its argument, so it gets a copy of the saved flags.
            ok = self.recorder.record(lambda *t: torch.cat(t).clone(), parts, BACKWARD, parts[0])
            messages, serious = map(list, zip(*said, strict=True))
            end = self.joint.call_function(torch.ops.revfx.check.default, (ok, messages, serious))
        end.meta.update(partitioner_tag=BACKWARD, val=None)
        return end


def _checksum(t: Tensor) -> Tensor:
    """Return an int64 that differs, up to collisions, if any bit or the order differs; zeros of either sign agree."""
    t = t.detach() + 0.0
    if t.is_complex():
        t = torch.view_as_real(t)
    bits = t.reshape(-1).view({8: torch.int64, 4: torch.int32, 2: torch.int16}[t.element_size()]).to(torch.int64)
    return (bits * (2 * torch.arange(bits.numel(), device=bits.device) + 1)).sum()


def _sample(t: Tensor) -> Tensor:
    """Return a copy of some elements of `t`, evenly spread over all its dimensions."""
    n = as_number(t.numel())
    stride = max(1, n // SAMPLE_ELEMENTS)
    while math.gcd(stride, n) > 1:  # else the sample might lie in one column
        stride += 1
    return t.detach().reshape(-1)[::stride].clone()


def _has_drifted(now: Tensor, before: Tensor, origin: Tensor) -> Tensor:
    """Return whether |now - before| > 1 % of the larger of |before| and |origin|, unless `before` is not finite.

    The scale includes the origin, as a difference of two large numbers that is zero comes back as their rounding error.
    """
    error, scale = (now - before).norm(), before.norm()
    return ~(error <= MAX_ERROR * torch.maximum(scale, origin.norm())) & torch.isfinite(scale)
