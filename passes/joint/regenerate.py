"""Regeneration: nodes in the backward that recompute or invert a region's values, added to the joint graph.

The forward changes in three ways only: random operations also return the state that they drew from, inverses that
round get codes, and facts that the compiler can't prove are checked.
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
from revfx.passes.joint.borders import Stored, copy_meta
from revfx.passes.joint.checks import Checks, Cut
from revfx.passes.joint.forward import BACKWARD, FORWARD, ForwardGraph, draws_numbers
from revfx.passes.joint.kept_cuts import find_origins
from revfx.passes.joint.record import Recorder, Unrecordable
from revfx.passes.program import Arc, Program
from revfx.passes.regions import Region
from revfx.passes.schedule import schedule
from revfx.passes.sizes import as_number, is_same_shape, tensors_of


if TYPE_CHECKING:
    from revfx.compiled.coded import Coder


aten: Any = torch.ops.aten


@dataclass(frozen=True)
class RewriteOptions:
    """The inner compiler's side of a rewrite.

    Attributes:
        decompositions: operators as functions of those that the graph consists of.
        stored: an identity that a fusing compiler does not look through (see `revfx.passes.joint.borders`).
        coder: makes codes, with which eager kernels give the forward's bits; None: inverses are right up to rounding.
    """

    decompositions: Mapping[Any, Callable[..., Any]] = field(default_factory=dict)
    stored: Stored | None = None
    coder: Callable[[], Coder] | None = None


class Regenerator:
    """Adds regeneration nodes for regions.

    Attributes:
        checks: the checks, with the nodes that must be saved and those that are attached to others.
        values: the regenerated node of each value.
        reruns: the node that recomputes each operation.
        step_of: the number of the backward's step that regenerates a node.
        replacements: nodes of the forward that also return a random state, by the nodes that they replace.
    """

    def __init__(self, joint: fx.Graph, forward: ForwardGraph, recorder: Recorder, options: RewriteOptions) -> None:
        self.joint: fx.Graph = joint
        self.forward: ForwardGraph = forward
        self.recorder: Recorder = recorder
        self.options: RewriteOptions = options
        self.program: Program = forward.lowered.program
        self.output: fx.Node = joint.output_node()
        self.checks: Checks = Checks(joint, self.program, recorder, self._original, lossless=options.coder is not None)
        self.values: dict[int, fx.Node] = {}
        self.reruns: dict[int, fx.Node] = {}
        self.step_of: dict[fx.Node, int] = {}
        self.replacements: dict[fx.Node, fx.Node] = {}
        self._value_of = {forward.value_node(v): v for v in range(len(self.program.values))}
        self._states: dict[fx.Node, fx.Node] = {}  # by random operation
        self._input_copies: dict[fx.Node, fx.Node] = {}  # by input that the step updates
        self._laid_out: dict[int, fx.Node] = {}  # by value: in the forward's layout
        self._codes: dict[int, tuple[fx.Node, ...]] = {}  # by value
        self._step = 0

    def regenerate(self, region: Region, wanted: set[int], ops: set[int], cuts: frozenset[int]) -> None:
        """Regenerate values of a region, from the last cut to the first.

        Args:
            region: the region.
            wanted: the values.
            ops: operations to recompute in any case.
            cuts: numbers of the cuts that are kept besides the first and the last; cut j lies before step j.

        Raises:
            Unrecordable: an inverse can't be written into the graph, which is left as it was.
        """
        nodes, symbols = frozenset(self.joint.nodes), dict(self.recorder.symbols)
        state, checks = _copy_collections(self), _copy_collections(self.checks)
        try:
            self._regenerate(region, wanted, ops, cuts)
        except Unrecordable:
            for node in reversed(list(self.joint.nodes)):
                if node not in nodes:
                    self.joint.erase_node(node)
            vars(self).update(state)
            vars(self.checks).update(checks)
            self.recorder.symbols = symbols
            raise

    def _regenerate(self, region: Region, wanted: set[int], ops: set[int], cuts: frozenset[int]) -> None:
        program = self.program
        self._keep((*region.exit, *region.saved, *region.side))
        stretch: list[Cut] = []  # regenerated since the last kept cut
        origins: dict[int, int] = {}  # also of values that a step passes on
        for j, step in reversed(list(enumerate(region.steps))):
            self._step += 1
            replay = j == 0 or j in cuts
            known = {*step.exit, *region.saved, *region.side, *region.entry}
            if replay:
                known.update(step.entry)
            known.difference_update(step.reselected)

            # A kept entry replaces the values that steps below regenerated: it has the bits of the forward.
            if replay and j > 0:
                self._keep(step.entry)
            if replay:
                for v in step.entry:
                    self.values.pop(v, None)
                    self._laid_out.pop(v, None)

            # Regenerate the values that the backward reads, and the entry for the step above.
            targets = wanted.intersection(program.results(step.start, step.stop))
            if not replay:
                targets.update({*step.entry} - known)
            reruns = ops.intersection(range(step.start, step.stop))
            for derivation in schedule(program, step, known, replay, targets, reruns):
                if isinstance(derivation, Forward):
                    self._rerun(derivation.op, known)
                    self.step_of[self.reruns[derivation.op]] = self._step
                else:
                    head = derivation.arc.head
                    self._invert(derivation.op, derivation.arc)
                    if head in self.values:
                        self.step_of[self.values[head]] = self._step

            # Regenerated cuts are compared with the forward's.
            if replay:
                self.checks.stretches.append(stretch)
                stretch = []
            else:
                regenerated = {v: self.values[v] for v in step.entry if v in self.values}
                origins.update(find_origins(step))
                stretch.append((regenerated, dict(origins), program.ops[step.start].where))

    # --- nodes of the forward
    def _original(self, value: int) -> fx.Node:
        """Return the forward's own node for a value."""
        return self._current(self.forward.value_node(value))

    def _current(self, node: fx.Node) -> fx.Node:
        """Return the node to read instead of one of the traced forward: its replacement, or an input's copy."""
        node = self.replacements.get(node, node)
        if node not in self.forward.mutated:
            return node
        if node not in self._input_copies:  # made in the forward, as the step updates the input
            self._input_copies[node] = copied = self.checks.record(lambda t: t.clone(), [node])
            self.checks.kept.add(copied)
        return self._input_copies[node]

    def _keep(self, values: Iterable[int]) -> None:
        self.checks.kept.update(map(self._original, values))

    def _save_random_state(self, node: fx.Node) -> fx.Node:
        """Let the forward return the generator state that a random operation drew from; return its node."""
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
            new.meta = {**copy_meta(node), "partitioner_tag": FORWARD, "val": val}
        self.replacements[node], self._states[node] = result, state
        return state

    # --- derivations
    def _rerun(self, op: int, known: set[int]) -> None:
        """Recompute an operation."""
        node = self.forward.op_node(op)
        target: Any = node.target
        args: Any = node.args
        name: str | None = f"{node.name}_again"
        if draws_numbers(node):
            state = self._save_random_state(node)
            target, args, name = torch.ops.higher_order.run_with_rng_state, (state, target, *args), None
        elif target is aten._native_batch_norm_legit_functional.default and args[5]:
            # The step has updated the running statistics since; this operator does not read them.
            target, args = aten._native_batch_norm_legit.no_stats, (*args[:3], *args[5:])
        with self.joint.inserting_before(self.output):
            args, kwargs = fx.map_arg(args, self._map_argument), fx.map_arg(node.kwargs, self._map_argument)
            new = self.joint.create_node(node.op, target, args, kwargs, name=name)
        new.meta = {**copy_meta(node), "partitioner_tag": BACKWARD}
        self.reruns[op] = new
        outs = self.program.ops[op].outs
        if isinstance(node.meta["val"], Tensor):
            self.values[outs[0]] = new
            return
        if target is aten._native_batch_norm_legit.no_stats:
            new.meta["val"] = tuple(node.meta["val"][:3])
        for v in outs:
            if v in known:
                continue
            part = self.forward.value_node(v)
            index: Any = part.args[1]
            if index >= len(new.meta["val"]):  # an updated statistic, which is the forward's own
                continue
            with self.joint.inserting_before(self.output):
                self.values[v] = self.joint.call_function(operator.getitem, (new, index))
            self.values[v].meta = {**copy_meta(part), "partitioner_tag": BACKWARD}

    def _map_argument(self, node: fx.Node) -> fx.Node:
        return self.backward_node(self._value_of[node]) if node in self._value_of else self._current(node)

    def backward_node(self, value: int) -> fx.Node:
        """Return the backward's node for a value, laid out as in the forward: views and kernels rely on it."""
        if value not in self.values:
            return self._original(value)
        if value not in self._laid_out:
            node, like = self.values[value], self.forward.value_node(value)
            is_rerun = node.meta["val"] is like.meta["val"]
            order = None if is_rerun else _find_dense_order(like.meta["val"], node.meta["val"])
            if order is not None:
                with self.joint.inserting_before(self.output):
                    node = self.recorder.record(lambda t: _copy_in_order(t, order), [node], BACKWARD, like)
            self._laid_out[value] = node
        return self._laid_out[value]

    def _invert(self, op: int, arc: Arc) -> None:
        """Compute the head of an inverse, or keep it if its code does not pay."""
        coder = None
        if self.options.coder is not None and rounds(arc):
            coder = self.options.coder()
            if not coder.codes(self.forward.value_node(arc.head).meta["val"]):
                self._keep([arc.head])
                return
        for value, fact in arc.assumes:
            self.checks.check_fact(op, value, fact)
        tail = list(map(self.backward_node, arc.tail))
        with self.joint.inserting_before(self.output):
            head = self.recorder.record(arc.solve, tail, BACKWARD, self.forward.op_node(op))
            if coder is not None:
                head = self.joint.call_function(coder.decode, (head, *self._encode(coder, arc)))
                head.meta = {**copy_meta(self.forward.value_node(arc.head)), "partitioner_tag": BACKWARD}
        self.values[arc.head] = head

    def _encode(self, coder: Coder, arc: Arc) -> tuple[fx.Node, ...]:
        """Return the nodes, in the forward, that are the code of an inverse's head."""
        if arc.head in self._codes:
            return self._codes[arc.head]
        x, *tail = map(self._original, (arc.head, *arc.tail))
        predicted = self.checks.record(arc.solve, tail, max(x, *tail))
        vals = coder.expected(x.meta["val"])
        with self.joint.inserting_before(predicted.next):
            encoded = self.joint.call_function(coder.encode, (x, predicted))
            code = tuple(self.joint.call_function(operator.getitem, (encoded, i)) for i in range(len(vals)))
        for node, val in zip((encoded, *code), (vals, *vals), strict=True):
            node.meta = {**copy_meta(x), "partitioner_tag": FORWARD, "val": val}
        self.checks.kept.update(code)
        self._codes[arc.head] = code
        if coder.may_lose(x.meta["val"]):
            self.checks.check_forward(lambda n: n == 0, [code[-1]], _torch.OVERFLOWED, serious=False)
        return code

    def attach_entries(self, alive: Collection[fx.Node]) -> None:
        """Regenerate the entry of a step, which replaces its exit, together with any of the step's values."""
        entries: dict[int, list[fx.Node]] = {}
        for node, step in self.step_of.items():
            if node in alive and any(self.step_of.get(user, step) > step for user in node.users):
                entries.setdefault(step, []).append(node)
        for node, step in self.step_of.items():
            self.checks.attached.setdefault(node, []).extend(entries.get(step, ()))


def _copy_collections(part: object) -> dict[str, Any]:
    """Return copies of the collections that an object holds."""
    return {k: copy.copy(v) for k, v in vars(part).items() if isinstance(v, (dict, set, list))}


def _find_dense_order(like: Tensor, t: Tensor) -> tuple[int, ...] | None:
    """Return the order of dimensions in which `t` must be laid out to allow the views of `like`; None: as it is.

    `like` may be a part of a larger tensor; then a dense layout in its order of dimensions allows the same views.
    """
    dims = [d for d in range(like.dim()) if as_number(like.shape[d]) != 1]
    order = sorted(dims, key=lambda d: (-as_number(like.stride(d)), d))
    dense: dict[int, Any] = {}
    size = 1
    for d in reversed(order):
        dense[d] = size
        size = size * t.shape[d]
    strides = [t.stride(d) for d in dims]
    if is_same_shape(strides, [like.stride(d) for d in dims]) or is_same_shape(strides, [dense[d] for d in dims]):
        return None
    return (*(d for d in range(like.dim()) if d not in dims), *order)


def _copy_in_order(t: Tensor, order: tuple[int, ...]) -> Tensor:
    """Return a copy of `t` that is contiguous in an order of its dimensions."""
    inverse = sorted(range(len(order)), key=lambda i: order[i])
    return t.permute(order).clone(memory_format=torch.contiguous_format).permute(inverse)
