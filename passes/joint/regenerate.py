"""Regeneration: the nodes that give a region's values back in the backward, added to the joint graph.

Nothing of the forward is changed but that random operations also return the state they drew from, and that checks of
what the compiler can't prove are added: that a factor stays away from zero, and that samples come back as they were.
"""

from __future__ import annotations

import copy
import functools
import itertools
import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from revfx.passes import _torch
from revfx.passes.closure import Forward as Rerun
from revfx.passes.cuts import Step
from revfx.passes.facts import check
from revfx.passes.grid import checksum, limit
from revfx.passes.joint.borders import POLICY, Stored
from revfx.passes.joint.forward import BACKWARD, FORWARD, Forward, draws
from revfx.passes.joint.record import Recorder, Unrecordable
from revfx.passes.plan import (
    MARGIN,
    amplification,
    drifted,
    inverted_from,
    larger,
    precision,
    sample,
    schedule,
    tolerance_of,
)
from revfx.passes.program import Arc
from revfx.passes.regions import Region
from revfx.passes.samples import mean_size, nearest
from revfx.passes.sizes import as_number, same_strides, tensors_of


aten = torch.ops.aten


@dataclass(frozen=True)
class Options:
    """What the rewrite may do: `unbounded` factors are guarded ("assert") or their inputs kept ("store").

    `tolerance` is what rounding may grow to between two kept cuts; None: the square root of the dtype's eps. Before
    every `anchor_every` couplings a cut is kept in any case. `decompositions` says how the graph spells operators.
    `grid`: regions compute on the grid 2^-grid, and what is regenerated must be bit for bit what it was. `stored` is
    an identity that an inner compiler which fuses does not look through (see `revfx.passes.joint.borders`).
    """

    unbounded: str = "assert"
    tolerance: float | None = None
    anchor_every: int | None = None
    grid: int | None = None
    decompositions: Mapping[Any, Callable[..., Any]] = field(default_factory=dict)
    stored: Stored | None = None


# The regenerated nodes of a cut's values, what they were computed back from, and where the cut lies.
Cut = tuple[Mapping[int, fx.Node], Mapping[int, int], str]


class Regenerator:
    """Adds regeneration nodes for regions; `values` and `tuples` then say what stands for what in the backward.

    `kept` holds the nodes that must be saved for it, `attached` the checks to make right after a node, and `step_of` in
    which step of the backward a node is regenerated.
    """

    def __init__(self, joint: fx.Graph, forward: Forward, recorder: Recorder, options: Options) -> None:
        self.joint, self.forward, self.recorder, self.options = joint, forward, recorder, options
        self.program = forward.lowered.program
        self.index = {forward.value_node(v): v for v in range(len(self.program.values))}
        self.op_index = {forward.op_node(i): i for i in range(len(self.program.ops))}
        self.output = joint.output_node()
        self._first = next(n for n in joint.nodes if n.op != "placeholder")
        self.values: dict[int, fx.Node] = {}
        self.tuples: dict[int, fx.Node] = {}
        self.kept: set[fx.Node] = set()
        self.attached: dict[fx.Node, list[fx.Node]] = {}
        self.step_of: dict[fx.Node, int] = {}
        self.stands: dict[fx.Node, fx.Node] = {}
        self._states: dict[fx.Node, fx.Node] = {}
        self._before: dict[fx.Node, fx.Node] = {}
        self._flags: dict[fx.Node, tuple[str, str]] = {}
        self._guarded: set[tuple[fx.Node, bool, float]] = set()
        self._relied_on: set[tuple[fx.Node, str]] = set()
        self._laid_out: dict[int, fx.Node] = {}
        self._stretches: list[list[Cut]] = []
        self._step = 0

    def region(self, region: Region, wanted: Mapping[int, Any], ops: Iterable[int], cuts: frozenset[int]) -> None:
        """Regenerate the `wanted` values and what the operations `ops` return, cut after cut from the exit.

        Besides the first and the last, the cuts in `cuts` are kept: cut j lies before step j.

        Raises:
            Unrecordable: an inverse can't be written into the graph, which is left as it was.
        """
        nodes, symbols = frozenset(self.joint.nodes), dict(self.recorder.symbols)
        before = {name: copy.copy(held) for name, held in vars(self).items() if isinstance(held, (dict, set, list))}
        try:
            self._region(region, wanted, ops, cuts)
        except Unrecordable:
            for node in [n for n in reversed(self.joint.nodes) if n not in nodes]:
                self.joint.erase_node(node)
            vars(self).update(before)
            self.recorder.symbols = symbols
            raise

    def _region(self, region: Region, wanted: Mapping[int, Any], ops: Iterable[int], cuts: frozenset[int]) -> None:
        program, steps, ops = self.program, region.steps, frozenset(ops)
        self._keep((*region.exit, *region.saved, *region.side))
        self._limit_growth(steps, cuts)
        cuts_since: list[Cut] = []  # regenerated since the last kept one
        origins: dict[int, int] = {}  # also of what a step passes on
        for j in range(len(steps) - 1, -1, -1):
            step = steps[j]
            self._step += 1
            replay = j == 0 or j in cuts
            inside = range(step.start, step.stop)
            made = {v for i in inside for v in program.ops[i].outs}
            known = {*step.exit, *region.saved, *region.side, *region.entry, *(step.entry if replay else ())}
            known.difference_update(step.again)
            if replay and j > 0:
                self._keep(step.entry)
            if replay:  # from what is kept, bit for bit, and not from what was regenerated of it above
                for v in step.entry:
                    self.values.pop(v, None)
                    self._laid_out.pop(v, None)
            want = frozenset((made & wanted.keys()) | (set() if replay else {v for v in step.entry if v not in known}))
            for do in schedule(program, step, known, replay, want, ops & set(inside)):
                if isinstance(do.run, Rerun):
                    self._rerun(do.run.op, known)
                    self.step_of[self.tuples[do.run.op]] = self._step
                else:
                    self._invert(do.run.op, do.run.arc)
                    self.step_of[self.values[do.run.arc.head]] = self._step
            if replay:
                self._stretches.append(cuts_since)
                cuts_since = []
            else:
                made_here = {v: self.values[v] for v in step.entry if v in self.values}
                origins.update(inverted_from(step))
                cuts_since.append((made_here, dict(origins), program.ops[step.start].where))

    def node(self, value: int) -> fx.Node:
        """Return what stands for a value in the backward: its regenerated node, or the forward's own."""
        return self.values[value] if value in self.values else self._original(value)

    def _own(self, node: fx.Node) -> fx.Node:
        node = self.stands.get(node, node)
        return self._as_it_was(node) if node in self.forward.mutated else node

    def _original(self, value: int) -> fx.Node:
        """Return the forward's own node for a value."""
        return self._own(self.forward.value_node(value))

    def _keep(self, values: Iterable[int]) -> None:
        self.kept.update(map(self._original, values))

    def _as_it_was(self, primal: fx.Node) -> fx.Node:
        """Return a copy, made in the forward, of an input that the step updates in place."""
        if primal not in self._before:
            self._before[primal] = held = self._record(lambda t: t.clone(), [primal])
            self.kept.add(held)
        return self._before[primal]

    # --- one derivation
    def _rerun(self, op: int, known: set[int]) -> None:
        node = self.forward.op_node(op)
        target, name = node.target, f"{node.name}_again"
        args: Any = node.args
        if draws(node):
            target, args, name = torch.ops.higher_order.run_with_rng_state, (self._state(node), target, *args), None
        elif target is aten._native_batch_norm_legit_functional.default and args[5]:
            # it would read statistics that the step has updated in the meantime
            target, args = aten._native_batch_norm_legit.no_stats, (*args[:3], *args[5:])
        with self.joint.inserting_before(self.output):
            args, kwargs = fx.map_arg(args, self._argument), fx.map_arg(node.kwargs, self._argument)
            again = self.joint.create_node(node.op, target, args, kwargs, name=name)
        again.meta = described(node, BACKWARD)
        stateless = target is aten._native_batch_norm_legit.no_stats
        if stateless:
            again.meta["val"] = tuple(node.meta["val"][:3])
        outs = self.program.ops[op].outs
        self.tuples[op] = again
        if isinstance(node.meta["val"], Tensor):
            self.values[outs[0]] = again
            return
        for v in (v for v in outs if v not in known):
            part = self.forward.value_node(v)
            if stateless and int(str(part.args[1])) >= len(again.meta["val"]):
                continue  # an updated statistic, which is the forward's own
            with self.joint.inserting_before(self.output):
                taken = self.joint.call_function(operator.getitem, (again, part.args[1]))
            taken.meta = described(part, BACKWARD)
            self.values[v] = taken

    def _argument(self, node: fx.Node) -> fx.Node:
        return self.laid_out(self.index[node]) if node in self.index else self._own(node)

    def laid_out(self, value: int) -> fx.Node:
        """Return what `node` does, in the forward's order of dimensions in memory, which views and kernels rely on."""
        found, like = self.node(value), self.forward.value_node(value)
        if value not in self.values or value in self._laid_out:
            return self._laid_out.get(value, found)
        same = found.meta["val"] is like.meta["val"]  # the same operation, run again
        order = None if same else _dense_order(like.meta["val"], found.meta["val"])
        if order is not None:
            with self.joint.inserting_before(self.output):
                found = self.recorder.record(lambda t: _laid_out(t, order), [found], BACKWARD, like)
        self._laid_out[value] = found
        return found

    def _state(self, node: fx.Node) -> fx.Node:
        """Return the node of the generator state that a random operation drew from; makes the forward return it."""
        if node in self._states:
            return self._states[node]
        target: Any = node.target
        val = tensors_of(node.meta["val"])[0]
        sample_state = torch.cuda.get_rng_state(val.device) if val.device.type == "cuda" else torch.get_rng_state()
        fake = val.fake_mode.from_tensor(sample_state)
        with self.joint.inserting_before(node):
            save = torch.ops.higher_order.run_and_save_rng_state
            both = self.joint.call_function(save, (target, *node.args), dict(node.kwargs))
            state = self.joint.call_function(operator.getitem, (both, 0))
            result = self.joint.call_function(operator.getitem, (both, 1))
        for new, val in ((both, (fake, node.meta["val"])), (state, fake), (result, node.meta["val"])):
            new.meta = {**described(node, FORWARD), "val": val}
        self.stands[node], self._states[node] = result, state
        return state

    def _invert(self, op: int, arc: Arc) -> None:
        node = self.forward.op_node(op)
        if arc.measured:
            self._guard(op, arc)
        if arc.assumes is not None:
            self._hold(op, *arc.assumes)
        tail = [self.node(v) for v in arc.tail]
        with self.joint.inserting_before(self.output):
            self.values[arc.head] = self.recorder.record(arc.solve, tail, BACKWARD, node)

    # --- what only the run can tell
    def _guard(self, op: int, arc: Arc) -> None:
        own = self._original(int(arc.factor or 0))
        least = tolerance_of(self.program.values[arc.head].dtype, self.options.tolerance)
        if arc.least >= least or (own, arc.reciprocal, least) in self._guarded:
            return
        self._guarded.add((own, arc.reciprocal, least))
        where = self.program.ops[op].where
        message = (
            f"revfx: a factor of the coupling at {where} came nearer to 0 than {least:.0e}, so its input can't be "
            "computed back from its output; compile with options={'unbounded': 'store'} to keep such inputs"
        )
        self._check_forward(lambda c: ~(nearest(c, arc.reciprocal) < least), [own], message)

    def _limit_growth(self, steps: Sequence[Step], cuts: frozenset[int]) -> None:
        """Raise, in every run, where factors that are data let rounding grow too much between two kept cuts."""
        kept = [0, *sorted(cuts), len(steps)]
        for cut, following in itertools.pairwise(kept):
            self._limit_stretch(steps[cut + 1 : following])

    def _limit_stretch(self, steps: Sequence[Step]) -> None:
        arcs = [a for s in steps for a in s.arcs if a.measured]
        dtypes = {self.program.values[a.head].dtype for a in arcs}
        if not arcs:
            return
        eps = max(torch.finfo(d).eps for d in dtypes)
        most = max(tolerance_of(d, self.options.tolerance) for d in dtypes) / (MARGIN * eps)
        factors = {a.scaled_by: a for a in arcs}
        worst = {by: 1 / max(a.least, 1e-300) for by, a in factors.items()}
        if _grown(steps, worst) <= most:
            return
        sizes = [self._record(functools.partial(mean_size, by), [self._original(v)]) for v, by in factors]
        where = self.program.ops[steps[0].start].where, self.program.ops[steps[-1].stop - 1].where
        message = (
            f"revfx: rounding grows too much where the couplings from {where[0]} to {where[1]} are computed back, as "
            "their factors come too near to 0; compile with options={'unbounded': 'store'} or {'anchor_every': 4}, "
            "which keep more, or use a wider dtype for the streams"
        )
        order = {node: i for i, node in enumerate(self.joint.nodes)}
        last = max(sizes, key=lambda n: order[n])
        self._check_forward(lambda *t: _grown(steps, dict(zip(factors, t, strict=True))) <= most, sizes, message, last)

    def _hold(self, op: int, value: int, fact: str) -> None:
        """Check in every run that a fact still holds of a value."""
        own = self._original(value)
        if (own, fact) not in self._relied_on:
            self._relied_on.add((own, fact))
            test, message = check(fact, own.name, self.program.ops[op].where)
            self._check_forward(test, [own], message)

    def check(self, alive: Collection[fx.Node]) -> None:
        """Compare samples of regenerated values with the forward's: of the lowest cut, where rounding has grown most,
        that the backward reads. `alive` holds the nodes that something needs.
        """
        for stretch in self._stretches:
            for cut, origins, where in reversed(stretch):
                read = {v: n for v, n in cut.items() if n in alive and precision(n.meta["val"].dtype) > 0}
                if read:
                    self._compare(read, origins, where)
                    break

    def whole_steps(self, alive: Collection[fx.Node]) -> None:
        """Regenerate the entry of a step, which takes the place of its exit, whenever anything of it is regenerated."""
        entries: dict[int, list[fx.Node]] = {}
        for node, step in self.step_of.items():
            if node in alive and any(self.step_of.get(u, step) > step for u in node.users):
                entries.setdefault(step, []).append(node)
        for node, step in self.step_of.items():
            self.attached[node] = [*self.attached.get(node, ()), *entries.get(step, ())]

    def _compare(self, cut: Mapping[int, fx.Node], origins: Mapping[int, int], where: str) -> None:
        message = (
            f"revfx: a value regenerated in the backward differs from the forward's by more than 1 % (below {where}): "
            "rounding has grown too much; compile with options={'anchor_every': 4} or {'unbounded': 'store'}, which "
            "keep more, use a wider dtype for the streams, or compile this model with plain inductor"
        )
        for v, now in cut.items():
            if self.program.values[v].grid is not None:
                self._compare_bits(v, now, where)
                continue
            samples = [self._record(sample, [self._original(i)]) for i in (v, origins.get(v, v))]
            self._check_backward(lambda a, b, c: ~drifted(sample(a), b, c), now, samples, message)

    def _compare_bits(self, v: int, now: fx.Node, where: str) -> None:
        message = (
            f"revfx: grid: a value regenerated in the backward is not bit for bit the forward's (below {where}): the "
            "kernels of the backward do not round as those of the forward do; compile with "
            "options={'inner': 'aot_eager'}"
        )
        before = self._record(checksum, [self._original(v)])
        self._check_backward(lambda a, b: checksum(a) == b, now, [before], message)

    def check_ranges(self) -> None:
        """Check in every run that no value leaves the grid, and that all of those that lie on it are finite."""
        for v, value in enumerate(self.program.values):
            if value.grid is None:
                continue
            node, most = self._original(v), limit(value.dtype, value.grid)
            where = self.program.ops[self.program.made_at[v]].where
            message = (
                f"revfx: grid={value.grid}: a value at {where or 'an unknown place'} is not finite or not below "
                f"{most:.4g}, where a grid of steps 2^-{value.grid} has room in {value.dtype}; use a smaller `grid`, "
                "scale the activations down, or do without"
            )
            self._check_forward(lambda t, most=most: t.abs().amax() < most, [node], message)

    def _behind(self, node: fx.Node) -> AbstractContextManager[None]:
        """Return a context in which nodes come right behind another one; behind all inputs where that is one."""
        return self.joint.inserting_before(self._first if node.op == "placeholder" else node.next)

    def _record(self, by: Callable[..., Tensor], tail: Sequence[fx.Node], last: fx.Node | None = None) -> fx.Node:
        """Return the node of `by(*tail)` in the forward, right behind the `last` one of the tail."""
        last = tail[0] if last is None else last
        with self._behind(last):
            return self.recorder.record(by, tail, FORWARD, last)

    def _check_forward(
        self, test: Callable[..., Tensor], tail: Sequence[fx.Node], message: str, last: fx.Node | None = None
    ) -> None:
        """Let the backward raise with this message if a test of the forward's nodes, see `_record`, gives false."""
        self._flags[self._record(test, tail, last)] = FORWARD, message

    def _check_backward(self, test: Callable[..., Tensor], now: fx.Node, then: Sequence[fx.Node], message: str) -> None:
        """Let the backward raise so if a test of what is `now` regenerated, and was kept `then`, gives false."""
        self.kept.update(then)
        with self.joint.inserting_before(self.output):
            ok = self.recorder.record(test, [now, *then], BACKWARD, now)
        self._flags[ok] = BACKWARD, message
        self.attached[now] = [ok]

    def raise_at_the_end(self) -> list[fx.Node]:
        """Return the checks, one for each device, that end the backward: no gradient is handed out before them.

        Those of the forward are made there too, so that nothing in it waits for a device.
        """
        checks: list[fx.Node] = []
        flags = {n: (n.meta["val"].device, *self._flags[n]) for n in self.joint.nodes if n in self._flags}
        for device in dict.fromkeys(device for device, *_ in flags.values()):
            parts, texts = list[fx.Node](), list[str]()
            for half in (FORWARD, BACKWARD):
                found = {n: text for n, (where, *said, text) in flags.items() if (where, *said) == (device, half)}
                if found:
                    with self.joint.inserting_before(self.output):
                        parts.append(self.recorder.record(lambda *t: torch.stack(t), [*found], half, next(iter(found))))
                    texts += found.values()
                    self.kept.update(parts if half == FORWARD else ())
            with self.joint.inserting_before(self.output):
                # a copy of what the forward saved, as the check is said to write it
                ok = self.recorder.record(lambda *t: torch.cat(t).clone(), parts, BACKWARD, parts[0])
            checks.append(_torch.add_check(self.joint, ok, texts, {"partitioner_tag": BACKWARD}))
        return checks


def _grown(steps: Sequence[Step], measured: Mapping[tuple[int, bool], Any]) -> Any:
    """Return what a rounding error of 1 has grown to over some steps."""
    growth: dict[int, Any] = {}
    for step in steps:
        growth = amplification(step, growth, measured)
    return functools.reduce(larger, growth.values(), 1.0)


def described(node: fx.Node, tag: str) -> dict[str, Any]:
    """Return what is to be said of a node that does again what `node` does, in a half of the graph by its `tag`."""
    return {**{k: v for k, v in node.meta.items() if k not in POLICY}, "partitioner_tag": tag}


def _dense_order(like: Tensor, t: Tensor) -> tuple[int, ...] | None:
    """Return the order of dimensions in which `t` must be laid out so that it can be viewed as `like` can; None: it can
    now.

    `like` may be a part of a larger tensor; then the dense layout with its order of dimensions does as well.
    """
    dims = [d for d in range(like.dim()) if as_number(like.shape[d]) != 1]
    order = sorted(dims, key=lambda d: (-as_number(like.stride(d)), d))
    dense, size = {}, 1
    for d in reversed(order):
        dense[d], size = size, size * t.shape[d]
    now = [t.stride(d) for d in dims]
    if same_strides(now, [like.stride(d) for d in dims]) or same_strides(now, [dense[d] for d in dims]):
        return None
    return (*(d for d in range(like.dim()) if d not in dims), *order)


def _laid_out(t: Tensor, order: tuple[int, ...]) -> Tensor:
    back = sorted(range(len(order)), key=lambda i: order[i])
    return t.permute(order).clone(memory_format=torch.contiguous_format).permute(back)
