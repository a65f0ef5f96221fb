"""Proofs: a replay runs at once, while the tensors that it stands for are there to compare with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from revfx import _fsdp, _torch
from revfx.engine import dispatch
from revfx.engine.call import UnitCall
from revfx.engine.collectives import all_agree
from revfx.engine.match import Match
from revfx.engine.plan import UnitPlan
from revfx.engine.unit import Replay
from revfx.passes.rounding import MAX_ERROR


def prove(replay: Replay, inputs: list[Any], check: Callable[[int, Tensor], None]) -> None:
    """Run a replay; call `check` with the slot and the tensor of each result as soon as it is there.

    Results are let go as soon as nothing reads them any more, so that the proof of a unit takes less memory than its
    replay.
    """
    slots: dict[fx.Node, list[int]] = {}
    returned: Any = replay.graph.output_node().args[0]
    for slot, node in zip(replay.outputs, returned, strict=True):
        slots.setdefault(node, []).append(slot)
    last: dict[fx.Node, fx.Node] = {}
    for node in replay.graph.nodes:
        if node.op != "output":
            last.update(dict.fromkeys((node, *node.all_input_nodes), node))
    env: dict[fx.Node, Any] = {}
    values = iter(inputs)
    with torch.enable_grad(), dispatch.replaying():
        for node in replay.graph.nodes:
            if node.op == "output":
                break
            if node.op == "placeholder":
                env[node] = next(values)
            else:
                args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
                env[node] = node.target(*args, **kwargs)
            for slot in slots.get(node, ()):
                check(slot, env[node])
            for n in (node, *node.all_input_nodes):
                if last[n] is node:
                    env.pop(n, None)


def same_values(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors have the same dtype, shape and elements; zeros of either sign are the same."""
    if a.shape != b.shape or a.dtype != b.dtype or a.layout != b.layout:
        return False
    if torch.equal(a, b):
        return True
    if a.layout != torch.strided or not _torch.is_plain(a) or not (a.is_floating_point() or a.is_complex()):
        return False
    return bool(((a == b) | ((a != a) & (b != b))).all())


def is_close(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors differ by rounding, as inverses without codes may."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not (a.is_floating_point() or a.is_complex()):
        return same_values(a, b)
    return bool((a - b).norm() <= MAX_ERROR * b.norm())


def prove_call(matched: UnitPlan, call: UnitCall, match: Match, reasons: dict[str, None]) -> bool:
    """Run the replay of a call and compare; keep tensors that differ. Return whether any may be dropped.

    Args:
        matched: the unit.
        call: its call, with all that the replays read.
        match: the tensors of the forward.
        reasons: why tensors are kept is added to these.
    """
    unit, broken = matched.unit, set[int]()
    stages = unit.stages
    if call.inverts:
        assert unit.backward is not None
        stages = (unit.backward,)
    is_right = is_close if call.is_rounded else same_values
    saved = {slot: s.tensor for s, slot in match.saved if s.tensor is not None}
    if unit.is_staged:
        saved.update((slot, t) for slot in unit.exit if (t := match.tensor(slot)) is not None)

    def check(slot: int, t: Tensor) -> None:
        if slot in unit.last_reader:
            call.passed[slot] = t
        if (
            call.inverts
            and slot in unit.entry
            and match.given(slot) is not None
            and not is_right(t, match.operand(slot))
        ):
            broken.add(slot)
        elif (
            slot in saved and slot not in matched.kept and slot not in unit.workspaces and not is_right(t, saved[slot])
        ):
            matched.kept.add(slot)
            reasons[f"{unit}: a saved tensor had other bits when it was replayed"] = None

    with _fsdp.gather_weights(call.given.values()):
        for number, replay in enumerate(stages):
            prove(replay, call.inputs(replay), check)
            for passed in [slot for slot, last in unit.last_reader.items() if last <= number]:
                call.passed.pop(passed, None)
        if unit.loan is not None:
            prove(unit.loan, call.inputs(unit.loan), check)
    is_broken = bool(broken)
    if matched.groups:
        device = next(iter(call.given.values())).device
        is_broken = not all_agree(not broken and not matched.kept, matched.groups, device)
    if is_broken:
        matched.is_broken = True
        reasons[f"{unit}: its inverse gave other bits when it was tried"] = None
        return False
    return True
