"""Regeneration: the nodes that give a region's values back in the backward, added to the joint graph.

Nothing of the forward is changed but that random operations also return the state they drew from, that codes are made
of what inverses miss, and that what the compiler can't prove is checked.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from revfx.passes import _torch
from revfx.passes.closure import Forward
from revfx.passes.composed import rounds
from revfx.passes.joint.borders import POLICY, Stored
from revfx.passes.joint.checks import Checks, Cut
from revfx.passes.joint.forward import BACKWARD, FORWARD, ForwardGraph, draws_numbers
from revfx.passes.joint.kept_cuts import inverted_from
from revfx.passes.joint.record import Recorder, Unrecordable
from revfx.passes.program import Arc
from revfx.passes.regions import Region
from revfx.passes.schedule import schedule
from revfx.passes.sizes import as_number, same, tensors_of


if TYPE_CHECKING:
    from revfx.compiled.coded import Coder


aten = torch.ops.aten


@dataclass(frozen=True)
class RewriteOptions:
    """The inner compiler's side of a rewrite: `decompositions` spell operators as the graph does.

    `stored` is an identity that an inner compiler which fuses does not look through (see
    `revfx.passes.joint.borders`). `coder` makes codes, by which eager kernels give the forward's very bits; None:
    inverses are right up to rounding.
    """

    decompositions: Mapping[Any, Callable[..., Any]] = field(default_factory=dict)
    stored: Stored | None = None
    coder: Callable[[], Coder] | None = None


class Regenerator:
    """Adds regeneration nodes for regions; `values` and `tuples` then map forward nodes to those of the backward.

    `checks` also holds the nodes that must be saved for it, and what comes right after a node; `step_of` says in which
    step of the backward a node is regenerated.
    """

    def __init__(self, joint: fx.Graph, forward: ForwardGraph, recorder: Recorder, options: RewriteOptions) -> None:
        self.joint, self.forward, self.recorder, self.options = joint, forward, recorder, options
        self.program = forward.lowered.program
        self.index = {forward.value_node(v): v for v in range(len(self.program.values))}
        self.output = joint.output_node()
        lossless = options.coder is not None
        self.checks = Checks(joint, self.program, recorder, self._original, lossless)
        self.values: dict[int, fx.Node] = {}
        self.tuples: dict[int, fx.Node] = {}
        self.step_of: dict[fx.Node, int] = {}
        self.stands: dict[fx.Node, fx.Node] = {}
        self._states: dict[fx.Node, fx.Node] = {}
        self._before: dict[fx.Node, fx.Node] = {}
        self._laid_out: dict[int, fx.Node] = {}
        self._codes: dict[int, tuple[fx.Node, ...]] = {}
        self._step = 0

    def region(self, region: Region, wanted: set[int], ops: set[int], cuts: frozenset[int]) -> None:
        """Regenerate the `wanted` values and the results of the operations `ops`, cut after cut from the exit.

        Besides the first and the last, the cuts in `cuts` are kept: cut j lies before step j. Unrecordable where an
        inverse can't be written into the graph, which is left as it was.
        """
        nodes, symbols = frozenset(self.joint.nodes), dict(self.recorder.symbols)
        parts = (self, self.checks)
        before = [{k: copy.copy(v) for k, v in vars(p).items() if isinstance(v, (dict, set, list))} for p in parts]
        try:
            self._region(region, wanted, ops, cuts)
        except Unrecordable:
            for node in [n for n in reversed(self.joint.nodes) if n not in nodes]:
                self.joint.erase_node(node)
            for part, then in zip(parts, before, strict=True):
                vars(part).update(then)
            self.recorder.symbols = symbols
            raise

    def _region(self, region: Region, wanted: set[int], ops: set[int], cuts: frozenset[int]) -> None:
        program, steps = self.program, region.steps
        self._keep((*region.exit, *region.saved, *region.side))
        cuts_since: list[Cut] = []  # regenerated since the last kept one
        origins: dict[int, int] = {}  # also of values that a step passes on
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
            if replay:  # from kept values, bit for bit, and not from regenerated ones above
                for v in step.entry:
                    self.values.pop(v, None)
                    self._laid_out.pop(v, None)
            want = frozenset((made & wanted) | (set() if replay else {v for v in step.entry if v not in known}))
            for do in schedule(program, step, known, replay, want, frozenset(ops.intersection(inside))):
                if isinstance(do.run, Forward):
                    self._rerun(do.run.op, known)
                    self.step_of[self.tuples[do.run.op]] = self._step
                else:
                    self._invert(do.run.op, do.run.arc)
                    if do.run.arc.head in self.values:
                        self.step_of[self.values[do.run.arc.head]] = self._step
            if replay:
                self.checks.stretches.append(cuts_since)
                cuts_since = []
            else:
                made_here = {v: self.values[v] for v in step.entry if v in self.values}
                origins.update(inverted_from(step))
                cuts_since.append((made_here, dict(origins), program.ops[step.start].where))

    def _own(self, node: fx.Node) -> fx.Node:
        node = self.stands.get(node, node)
        return self._as_it_was(node) if node in self.forward.mutated else node

    def _original(self, value: int) -> fx.Node:
        """Return the forward's own node for a value."""
        return self._own(self.forward.value_node(value))

    def _keep(self, values: Iterable[int]) -> None:
        self.checks.kept.update(map(self._original, values))

    def _as_it_was(self, primal: fx.Node) -> fx.Node:
        """Return a copy, made in the forward, of an input that the step updates in place."""
        if primal not in self._before:
            self._before[primal] = held = self.checks.record(lambda t: t.clone(), [primal])
            self.checks.kept.add(held)
        return self._before[primal]

    # --- one derivation
    def _rerun(self, op: int, known: set[int]) -> None:
        node = self.forward.op_node(op)
        target, name = node.target, f"{node.name}_again"
        args: Any = node.args
        if draws_numbers(node):
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
        """Return the backward's node for a value, laid out as in the forward: views and kernels rely on it."""
        if value not in self.values:
            return self._original(value)
        if value in self._laid_out:
            return self._laid_out[value]
        found, like = self.values[value], self.forward.value_node(value)
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
        coder = self.options.coder() if self.options.coder is not None and rounds(arc) else None
        if coder is not None and not coder.codes(self.forward.value_node(arc.head).meta["val"]):
            self._keep([arc.head])
            return
        for value, fact in arc.assumes:
            self.checks.hold(op, value, fact)
        tail = [self.laid_out(v) for v in arc.tail]
        with self.joint.inserting_before(self.output):
            found = self.recorder.record(arc.solve, tail, BACKWARD, node)
            if coder is not None:
                parts = self._code(coder, arc)
                found = self.joint.call_function(coder.decode, (found, *parts))
                found.meta = described(self.forward.value_node(arc.head), BACKWARD)
        self.values[arc.head] = found

    def _code(self, coder: Coder, arc: Arc) -> tuple[fx.Node, ...]:
        """Return the nodes, in the forward, that are the code of an inverse's head."""
        if arc.head not in self._codes:
            x, tail = self._original(arc.head), [self._original(v) for v in arc.tail]
            predicted = self.checks.record(arc.solve, tail, max(x, *tail))
            vals = coder.expected(x.meta["val"])
            with self.joint.inserting_before(predicted.next):
                whole = self.joint.call_function(coder.encode, (x, predicted))
                made = tuple(self.joint.call_function(operator.getitem, (whole, i)) for i in range(len(vals)))
            for node, val in zip((whole, *made), (vals, *vals), strict=True):
                node.meta = {**described(x, FORWARD), "val": val}
            self.checks.kept.update(made)
            self._codes[arc.head] = made
            if coder.may_lose(x.meta["val"]):
                self.checks.check_forward(lambda n: n == 0, [made[-1]], _torch.OVERFLOWED, serious=False)
        return self._codes[arc.head]

    def whole_steps(self, alive: Collection[fx.Node]) -> None:
        """Regenerate the entry of a step, which takes the place of its exit, whenever anything of it is regenerated."""
        entries: dict[int, list[fx.Node]] = {}
        for node, step in self.step_of.items():
            if node in alive and any(self.step_of.get(u, step) > step for u in node.users):
                entries.setdefault(step, []).append(node)
        for node, step in self.step_of.items():
            self.checks.attached.setdefault(node, []).extend(entries.get(step, ()))


def described(node: fx.Node, tag: str) -> dict[str, Any]:
    """Return the metadata of a copy of `node` in a half of the graph, by its `tag`."""
    return {**{k: v for k, v in node.meta.items() if k not in POLICY}, "partitioner_tag": tag}


def _dense_order(like: Tensor, t: Tensor) -> tuple[int, ...] | None:
    """Return in which order of dimensions `t` must be laid out to be viewed as `like` can; None: as it is.

    `like` may be a part of a larger tensor; then the dense layout with its order of dimensions does as well.
    """
    dims = [d for d in range(like.dim()) if as_number(like.shape[d]) != 1]
    order = sorted(dims, key=lambda d: (-as_number(like.stride(d)), d))
    dense, size = {}, 1
    for d in reversed(order):
        dense[d], size = size, size * t.shape[d]
    now = [t.stride(d) for d in dims]
    if same(now, [like.stride(d) for d in dims]) or same(now, [dense[d] for d in dims]):
        return None
    return (*(d for d in range(like.dim()) if d not in dims), *order)


def _laid_out(t: Tensor, order: tuple[int, ...]) -> Tensor:
    back = sorted(range(len(order)), key=lambda i: order[i])
    return t.permute(order).clone(memory_format=torch.contiguous_format).permute(back)
