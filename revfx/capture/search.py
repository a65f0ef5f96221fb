"""From a model and its arguments to a plan: capture coarsely, look for regions, open what lies outside them, repeat."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from revfx import _fake, _torch
from revfx.capture.data import Capture, Spot, steps_to
from revfx.capture.guards import Change, GlobalReads, ModuleGuard, key, module_guards, name_of
from revfx.capture.plan import Place, Plan, call_of
from revfx.capture.trace import capture
from revfx.capture.untraceable import Untraceable
from revfx.eager.modes import without_hooks
from revfx.eager.region_plan import RegionPlan
from revfx.errors import Reason, Refusal
from revfx.passes._torch import no_dispatch
from revfx.passes.arcs import Lowered, lower
from revfx.passes.closure import Invert
from revfx.passes.diagnose import diagnose
from revfx.passes.regions import Region, find_regions
from revfx.passes.segments import segments
from revfx.passes.sizes import muted
from revfx.rules import has_rule


Forward = Callable[..., Any]


@dataclass(frozen=True)
class Outcome:
    """A plan, or None where nothing pays; what was refused; whether the root itself could not be recorded. `once`: more
    may be recorded when it has run. `guard`: how the root was where there is no plan.
    """

    plan: Plan | None
    refusals: tuple[Refusal, ...]
    untraceable: bool = False
    once: bool = False
    guard: ModuleGuard | None = None

    def stale(self) -> Change | None:
        """Return what changed since then; None where nothing did that may lead to another outcome."""
        found = self.guard if self.plan is None else self.plan
        return None if found is None else found.changed()


def make_plan(
    root: nn.Module,
    forward: Forward,
    args: Any,
    kwargs: Any,
    exact: bool = True,
    carried: frozenset[Spot] = frozenset(),
) -> Outcome:
    """Return the plan of `forward(*args, **kwargs)`, or why there is none; the model does not run on real data.

    `exact`: see `convert`. The numbers that are attributes at `carried` are inputs of the plan.
    """
    search = Search(root, forward, args, kwargs, exact, carried)
    try:
        # the fake forward may run inside another region, and under modes that count or change what runs
        with without_hooks(), no_dispatch(), muted(_fake.FAKE_LOGGER):
            return search.run()
    except Untraceable as e:
        name = name_of(root)
        refusal = Refusal(e.kind, (name,), e.where, f"{name} can't be recorded: {e.reason}")
        refusals = (*search.refusals.values(), refusal)
        return Outcome(None, refusals, untraceable=True, once=e.once, guard=_modes_of(root))


class Search:
    """Coarse to fine: sub-modules are whole at first; those outside the regions found are opened, level by level."""

    def __init__(
        self, root: nn.Module, forward: Forward, args: Any, kwargs: Any, exact: bool, carried: frozenset[Spot]
    ) -> None:
        self.exact, self.carried = exact, carried
        self.root, self.forward, self.args, self.kwargs = root, forward, args, kwargs
        self.modules = dict(root.named_modules(remove_duplicate=True))
        self.closed: set[str] = set()
        self.refusals: dict[str, Refusal] = {}
        self.once = False
        self.whole = frozenset[Forward]()  # functions that are called whole

    def run(self) -> Outcome:
        found, opened = self._find_opening(frozenset())
        while more := self._outside(found, opened):
            try:
                found, opened = self._find_opening(opened | more)
            except Untraceable as e:
                self._close(e, more)
        if found[2]:
            found = self._close_again(found, opened)
        captured, lowered, regions, stuck = found
        reasons = [r for s in stuck[:32] for r in diagnose(lowered.program, s)]
        refusals = tuple(dict.fromkeys((*self.refusals.values(), *reasons)))
        if not regions:
            return Outcome(None, refusals, once=self.once, guard=_modes_of(self.root))
        return Outcome(self._plan(captured, lowered, regions), refusals, once=self.once)

    def _find_opening(self, opened: frozenset[str]) -> tuple[Any, frozenset[str]]:
        """Return what is found with those modules open, and with others whose own code has to be seen for it."""
        while True:
            try:
                return self._find(opened), opened
            except Untraceable as e:
                if e.whole is not None and e.whole not in self.whole:
                    self.whole |= {e.whole}
                    continue
                if e.opens is None or e.opens in opened or e.opens in self.closed or not self._openable(e.opens):
                    raise
                kind = type(self.modules[e.opens])  # what is said of one will be said of the others
                opened |= {p for p, m in self.modules.items() if type(m) is kind and p and self._openable(p)}

    def _find(self, opened: frozenset[str]) -> tuple[Capture, Lowered, tuple[Region, ...], tuple[Any, ...]]:
        captured, lowered = self._lowered(opened)
        return (captured, lowered, *find_regions(lowered.program))

    def _lowered(self, opened: frozenset[str]) -> tuple[Capture, Lowered]:
        captured = capture(self.root, self.forward, self.args, self.kwargs, opened, self.carried, self.whole)
        return captured, lower(captured.graph, self.modules.__getitem__, lossless=self.exact)

    def _outside(self, found: Any, opened: frozenset[str]) -> frozenset[str]:
        """Return the whole sub-modules outside any region that may be opened."""
        _, lowered, regions, _ = found
        covered = {i for r in regions for i in range(r.start, r.stop)}
        paths = {str(n.target) for i, n in enumerate(lowered.op_nodes) if n.op == "call_module" and i not in covered}
        return frozenset(p for p in paths - self.closed - opened if self._openable(p))

    def _openable(self, path: str) -> bool:
        module = self.modules[path]
        script, hooked = isinstance(module, torch.jit.ScriptModule), _torch.has_hooks(module)
        if script or (hooked and [*module.children()]):
            reason = "it is a ScriptModule" if script else "it has hooks, which run only when it is called whole"
            self.closed.add(path)
            self.refusals[path] = Refusal(Reason.OPAQUE, (path,), "", f"`{path}` stays whole: {reason}")
            return False
        seen_through = isinstance(module, SEEN_THROUGH) or _is_square(module)
        builtin = type(module).__module__.startswith("torch.") and not seen_through
        return not builtin and not has_rule(type(module)) and not hooked

    def _close(self, error: Untraceable, more: frozenset[str]) -> None:
        """Leave whole the module at fault and its like; all that was just opened where it can't be told which."""
        at_fault = [error.path] if error.path is not None and error.path in more else list(more)
        self.once |= error.once
        kinds = {type(self.modules[p]) for p in at_fault}
        self.closed.update(p for p in more if type(self.modules[p]) in kinds)
        name = at_fault[0]
        self.refusals[name] = Refusal(error.kind, (name,), error.where, f"`{name}` stays whole: {error.reason}")

    def _close_again(self, found: Any, opened: frozenset[str]) -> Any:
        """Return the same regions with only those modules open whose insides the backward needs to see."""
        _, lowered, regions, _ = found
        needed, inside = set[str](), set[str]()
        for r in regions:
            inverted = {d.op for s in r.steps for d in s.derive if isinstance(d, Invert)}
            for i in range(r.start, r.stop):
                # of the modules that enclose it
                paths = [*accumulate(str(lowered.op_nodes[i].meta["scope"]).split("."), "{}.{}".format)]
                inside.update(paths)
                needed.update(paths if i in inverted else ())
        if opened <= needed:
            return found
        again, kept = self._find_opening(opened & needed)
        while lost := self._outside(again, kept) & opened & inside:  # a region begins or ends in their midst
            again, kept = self._find_opening(kept | lost)
        return again if _inverted(again[2]) >= _inverted(regions) else found

    def _readable(self, captured: Capture) -> tuple[list[nn.Module], list[nn.Module]]:
        """Return the modules whose code was recorded, and those that are called whole."""
        whole = {str(n.target) for n in captured.graph.nodes if n.op == "call_module"}
        inside = tuple(f"{p}." for p in whole)  # which is not read
        own = [m for p, m in self.modules.items() if p not in whole and not p.startswith(inside)]
        return own, [self.modules[p] for p in whole if not p.startswith(inside)]

    def _plan(self, captured: Capture, lowered: Lowered, regions: tuple[Region, ...]) -> Plan:
        sources = [(lowered.index[n], self._place(*at)) for n, at in captured.attributes.items()]
        constants = [
            (t := n.meta["constant"], _torch.version(t), _torch.data_address(t), self._place(*at))
            for n, at in captured.attributes.items()
            if "constant" in n.meta and (n.users or "asked" in n.meta)
        ]
        tied = [(self._place(*a), self._place(*b)) for a, b in captured.tied]
        inside = [(place, key(place.tensor())) for _, place in sources if not place.name.isidentifier()]
        own, whole = self._readable(captured)
        return Plan(
            lowered, captured, segments(lowered.program, regions),
            {r.start: RegionPlan(lowered.program, r, self.exact) for r in regions},
            tuple(call_of(lowered, i, self.modules.__getitem__) for i in range(len(lowered.op_nodes))), tuple(sources),
            tuple(constants), tuple(tied), tuple(inside), tuple(self._place(*at) for at in captured.sets),
            module_guards(own, whole, captured.reads, captured.written),
            GlobalReads([self.forward, *(type(m).forward for m in own), *captured.reads.functions()]),
        )  # fmt: skip

    def _place(self, path: str, name: str) -> Place:
        return Place(weakref.ref(self.modules[path]), name, steps_to(name))


def _modes_of(root: nn.Module) -> ModuleGuard:
    """Return a guard for what a model that is left as it was may be switched by; numbers that it counts are none."""
    switches = [k for k, v in vars(root).items() if isinstance(v, (bool, str, type(None)))]
    return ModuleGuard(root, switches, frozenset(), opened=False)


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
SEEN_THROUGH = (
    nn.Sequential, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle,
    nn.Tanh, nn.Sigmoid, nn.LeakyReLU, nn.ELU, nn.SELU, nn.Softplus,
)  # fmt: skip


def _is_square(module: nn.Module) -> bool:
    """Return whether a module may be an invertible linear map."""
    if isinstance(module, nn.Linear):
        return module.in_features == module.out_features
    return isinstance(module, CONVOLUTIONS) and module.kernel_size == module.stride


def _inverted(regions: Sequence[Region]) -> int:
    return sum(s.inverts for r in regions for s in r.steps)
