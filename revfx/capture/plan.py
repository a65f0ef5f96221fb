"""A plan: a recorded forward as it is run, region by region, while what its code read is as it was."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from revfx import _torch
from revfx.capture.data import Capture, Carried, held_at
from revfx.capture.guards import Change, GlobalReads, ModuleGuard, key
from revfx.eager.calls import Call, Slot
from revfx.eager.executor import run_region
from revfx.eager.region_plan import RegionPlan
from revfx.info import PlanInfo
from revfx.passes.arcs import Lowered
from revfx.passes.regions import summary
from revfx.passes.segments import Segment, text
from revfx.rules import op_name


class InvalidError(Exception):
    """A distribution was given what it can't take: plain code says what."""


@dataclass(frozen=True)
class Place:
    """Where a tensor hangs: a module, its name there, and the `steps` that lead to it."""

    module: weakref.ref[nn.Module]
    name: str
    steps: tuple[tuple[str, Any], ...]

    def tensor(self) -> Any:
        """Return what hangs there now, a number as a tensor; None where the module is gone."""
        found = held_at(self.module(), self.steps)
        return torch.tensor(found, dtype=torch.float64) if isinstance(found, float) else found


@dataclass(frozen=True)
class Plan:
    """How to run one model on arguments of given shapes.

    `inside` are the tensors that objects hold, with what they are like, `sets` the attributes that a run sets. `guards`
    are the modules that the recorded code read, and those inside of what it calls whole, `globals` what else it read;
    the plan is valid while they are as they were. It belongs to the model, and refers to the model's modules weakly: a
    model that is let go is freed at once.
    """

    lowered: Lowered
    captured: Capture
    segments: tuple[Segment, ...]
    regions: dict[int, RegionPlan]
    calls: tuple[Call, ...]
    sources: tuple[tuple[int, Place], ...]
    constants: tuple[tuple[Tensor, int, int | None, Place], ...]
    tied: tuple[tuple[Place, Place], ...]
    inside: tuple[tuple[Place, Any], ...]
    sets: tuple[Place, ...]
    guards: list[ModuleGuard]
    globals: GlobalReads

    def changed(self) -> Change | None:
        """Return what changed since the code was recorded, that it may read; None where nothing did."""
        for guard in self.guards:
            if (change := guard.changed()) is not None:
                return change
        if (name := self.globals.changed()) is not None:
            return Change(name)
        for place, other in self.tied:
            if place.tensor() is not other.tensor():
                return Change(f"`{place.name}`, which was `{other.name}` too")
        for place, then in self.inside:
            if key(place.tensor()) != then:
                return Change(f"the tensor in `{place.name}`")
        for t, version, address, place in self.constants:
            if place.tensor() is not t or _torch.version(t) != version or _torch.data_address(t) != address:
                return Change(f"the numbers in `{place.name}`")
        return None

    def run(self, leaves: Sequence[Any], store: bool = False) -> Any:
        """Return the model's result for flattened arguments; with `store`, with ordinary autograd storage.

        Raises:
            InvalidError: a distribution that validates its arguments would raise.
        """
        program, last = self.lowered.program, self.lowered.program.last_use
        env: dict[int, Tensor] = {
            i: leaves[at] for i, at in zip(self.lowered.inputs, self.captured.inputs, strict=True)
        }
        env.update((index, place.tensor()) for index, place in self.sources)
        for segment in self.segments:
            if segment.region is not None and not store:
                live = {v: t for v, t in env.items() if last[v] >= segment.start or program.values[v].source}
                del env
                run_region(self.regions[segment.start], self.calls, live)
                env = live
            else:
                for i in range(segment.start, segment.stop):
                    op = program.ops[i]
                    for v, t in zip(op.outs, self.calls[i].invoke(env), strict=True):
                        env[v] = t
                    for v in (*op.ins, *op.outs):
                        if last[v] <= i and not program.values[v].source:
                            env.pop(v, None)
        out = [self._given_back(o, env) for o in self.captured.outputs]
        spec, end = self.captured.spec, len(out) - len(self.sets)
        if not all(out[spec.num_leaves : end]):
            raise InvalidError
        for place, t in zip(self.sets, out[end:], strict=True):
            setattr(place.module(), place.name, t)
        return pytree.tree_unflatten(out[: spec.num_leaves], spec)

    def _given_back(self, output: Any, env: Mapping[int, Tensor]) -> Any:
        if isinstance(output, Carried):
            return output.made([env[self.lowered.index[n]] for n in output.tensors])
        return env[self.lowered.index[output]]

    @property
    def code(self) -> str:
        """The rewritten program as text, with the backward's action for each value of a region."""
        return text(self.lowered, self.segments)

    @property
    def info(self) -> PlanInfo:
        """The plan as frozen data."""
        program = self.lowered.program
        found = [summary(program, r.region, r.kept, r.region.freed_bytes) for r in self.regions.values()]
        return PlanInfo(tuple(found), self.code)


def call_of(lowered: Lowered, i: int, module_of: Callable[[str], nn.Module]) -> Call:
    """Return how operation `i` of a lowered graph is run."""
    node, op, index = lowered.op_nodes[i], lowered.program.ops[i], lowered.index
    if node.op == "call_module":
        fn: Any = functools.partial(nn.Module.__call__, module_of(str(node.target)))  # an override of it was recorded
    elif node.op == "call_method":
        fn = getattr(torch.Tensor, str(node.target))
    else:
        fn = node.target
    if "ambient" in node.meta:
        fn = node.meta["ambient"].entered()(fn)  # which is entered in every call
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: cast(Any, Slot(index[n])))
    return Call(op_name(node.target), fn, args, kwargs, tuple(_path(lowered.value_nodes[v], node) for v in op.outs))


def _path(node: Any, root: fx.Node) -> tuple[Any, ...]:
    """Return the keys that lead from what `root` returns to the value `node`."""
    return () if node is root else (*_path(node.args[0], root), node.args[1])
