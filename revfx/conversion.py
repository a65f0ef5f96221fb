"""What a converted model knows: its plans, when they are made and made again, and what was left as it was."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from revfx import _fake, _torch
from revfx.ambient import ambient_state
from revfx.capture.data import Spot
from revfx.capture.guards import ATOMS, Change, is_gone, key, name_of
from revfx.capture.memo import structure
from revfx.capture.plan import InvalidError, Plan
from revfx.capture.search import Outcome, make_plan
from revfx.compiled.functions import CompiledFunction, Kernels
from revfx.eager.calls import Slot
from revfx.eager.modes import can_store, is_distributed, runs_plain, sees_the_engine, store_activations, storing
from revfx.errors import NotConvertedWarning, NotReversibleError, Reason, Refusal, list_refusals, warn
from revfx.fit.budget import Budget
from revfx.fit.compiled import BlockCalls
from revfx.fit.fit import Call as FitCall, Fit, may_fit
from revfx.info import ConversionInfo
from revfx.plan.couplings import Couplings
from revfx.plan.model import Kind, PlannedModel, is_watched


MOST_PLANS = 32  # per model; the oldest one makes room for a new one


@dataclass(frozen=True)
class Options:
    """What `convert` was asked for; `part` is set for the sub-modules of a model that can't be recorded."""

    exact: bool = True
    strict: bool = False
    part: bool = False
    compile: bool = False
    memory: Budget | None = None


class Conversion:
    """The options of a converted model, and one outcome per kind of call."""

    def __init__(
        self,
        forward: Callable[..., Any] | None,
        options: Options,
        convert_parts: Callable[[nn.Module, Options], None],
        unconverted: Callable[[nn.Module], nn.Module],
    ) -> None:
        self.own_forward, self.options = forward, options
        self.convert_parts, self.unconverted = convert_parts, unconverted
        self.outcomes: list[tuple[Any, Any, Outcome]] = []  # with the kind of call, and the objects it was given
        self.lock = threading.RLock()
        self.warned: set[str] = set()
        self.carried, self.constant = frozenset[Spot](), frozenset[Spot]()  # numbers that change: inputs, or not
        self.parts_converted = False
        self.place: tuple[dict[str, nn.Module | None], str] | None = None  # of a part: where its parent has it
        self.planned = None if options.compile or options.memory is not None else PlannedModel(options.exact)
        self.fit = None if options.memory is None or options.part else Fit(options.memory)
        self.block_calls: BlockCalls | None = None  # compiled ones of a model with a budget
        self.compiled_functions: list[tuple[str, str, CompiledFunction]] = []  # with their names and places

    @property
    def plans(self) -> list[Plan]:
        """Return the plans made so far of recorded forwards."""
        return [o.plan for *_, o in self.outcomes if o.plan is not None]

    @property
    def couplings(self) -> list[Couplings]:
        """The regions of each kind of call that were found so far."""
        kinds = () if self.planned is None else self.planned.kinds.values()
        return [kind.found for kind in kinds if kind.units]

    @property
    def coded_bytes(self) -> int:
        """The bytes of the codes of the latest forward."""
        return 0 if self.planned is None else self.planned.coded_bytes

    @property
    def info(self) -> ConversionInfo:
        """The findings so far, as frozen data."""
        found = tuple([p.info for p in self.plans])
        refusals = [r for *_, o in self.outcomes for r in o.refusals]
        is_called = bool(self.outcomes)
        if self.planned is not None:
            found = (*found, *(kind.info for kind in self.planned.kinds.values() if kind.units))
            refusals += self.planned.refusals
            is_called = is_called or bool(self.planned.kinds)
        refusals = tuple(dict.fromkeys((*refusals, *self.not_compiled)))
        regions = tuple(r for p in found for r in p.regions)
        plans = found if self.fit is None else self.fit.budget_plans
        no_plan = "no plan yet: the first call makes it"
        if self.fit is not None:
            no_plan = "no plan now: the next training step makes one, if the forward can be recorded"
        elif is_called:
            no_plan = "no plan: nothing reversible was found; `.refusals` lists the reasons"
            if self.parts_converted:
                no_plan = "no plan: the forward can't be recorded; its sub-modules have plans of their own"
        program = "\n\n".join(map(str, plans)) or f"({no_plan})"
        return ConversionInfo(regions, refusals, plans, program)

    @property
    def not_compiled(self) -> list[Refusal]:
        """Return what runs as it is, although it was to be compiled, and why; it shows when it is called."""
        return [
            Refusal(Reason.NOT_COMPILED, (name,), where, f"`{name}` is not compiled: {function.kernels.failed}")
            for name, where, function in self.compiled_functions
            if function.kernels.failed is not None
        ]

    def forward(self, model: nn.Module) -> Callable[..., Any]:
        """Return the model's own forward."""
        if self.own_forward is not None:
            return self.own_forward
        return functools.partial(type(model)._revfx_base.forward, model)  # type: ignore[union-attr]

    def prepare(
        self, model: nn.Module, args: Any, kwargs: Any, leaves: Sequence[Any], spec: Any, ran: bool = False
    ) -> Outcome:
        """Return the outcome for calls like this one, whose arguments are these leaves, made now if there is none.

        Unless it `ran` already, what may only be so until it has run is not kept.
        """
        call = (_call_key(leaves), spec, ambient_state())
        with self.lock:
            why = Change("the shapes, types or values of its arguments")
            for known, given, outcome in reversed(self.outcomes):
                if known == call and (outcome.plan is None or given == _objects(leaves)):
                    change = outcome.stale()
                    if change is None:
                        return outcome
                    why = change
            self.outcomes = [(c, given, o) for c, given, o in self.outcomes if not is_gone(given)]
            if len(self.outcomes) >= MOST_PLANS:
                del self.outcomes[0]
                _fake.FakeMode.cache_clear()  # what torch remembers of each shape
                self._warn(
                    f"`convert({name_of(model)})`: its forward is recorded again and again, now as {why.text} changed."
                    f" Only the {MOST_PLANS} newest plans are kept. What changes from call to call should be a tensor:"
                    " an argument or a buffer."
                )
            given = model, self.forward(model), args, kwargs, self.options.exact
            outcome = make_plan(*given, self._carries(model, why))
            if outcome.plan is not None and self.options.compile:
                outcome = replace(outcome, plan=self._with_kernels(outcome.plan))
            if outcome.plan is None and self.carried:
                self.carried, self.constant = frozenset[Spot](), self.constant | self.carried
                outcome = make_plan(*given, self.carried)
            if outcome.once and not (ran or self.options.strict):
                return outcome
            self._leave(model, outcome)
            self.outcomes.append((call, _objects(leaves), outcome))
            return outcome

    def _with_kernels(self, plan: Plan) -> Plan:
        """Return the plan with the modules that its regions call compiled, those that are alike once."""
        kernels, calls, program = defaultdict[Any, Kernels](Kernels), list(plan.calls), plan.lowered.program
        for i in (i for r in plan.regions.values() for i in range(r.region.start, r.region.stop)):
            call, op = calls[i], program.ops[i]
            if (module := call.module) is not None:
                shapes = tuple((program.values[v].shape, program.values[v].dtype) for v in op.ins)
                args = tuple("" if isinstance(a, Slot) else repr(a) for a in (*call.args, *call.kwargs.values()))
                function = CompiledFunction(module, kernels[structure(module), shapes, args])
                calls[i] = replace(call, fn=function)
                self.compiled_functions.append((call.name, op.where, function))
        return replace(plan, calls=tuple(calls))

    def _carries(self, model: nn.Module, change: Change) -> frozenset[Spot]:
        """Return where a fraction hangs that changed, if it may be an input of plans instead of a constant."""
        if isinstance(getattr(change.module, change.name, None), float):
            found = {(path, change.name) for path, m in model.named_modules() if m is change.module}
            self.carried |= found - self.constant
        return self.carried

    def _leave(self, model: nn.Module, outcome: Outcome) -> None:
        """Raise, under `strict`, where something is left as it was; convert the parts of a root that is."""
        # An exception may be the model's own: then its real call raises it, and nothing was converted.
        own = outcome.untraceable and outcome.refusals[-1].kind is Reason.UNTRACEABLE
        if self.fit is None and not own:
            self._check_strict(model, outcome)
            if outcome.untraceable:
                self._convert_parts(model)

    def _check_strict(self, model: nn.Module, outcome: Outcome) -> None:
        if self.options.strict and (outcome.plan is None or outcome.refusals):
            node = outcome.refusals[0].op if outcome.refusals else None
            what = f"`convert({name_of(model)}, strict=True)`: left as it was"
            raise NotReversibleError(f"{what}:\n{list_refusals(outcome.refusals)}", node, outcome.refusals)

    def _convert_parts(self, model: nn.Module) -> None:
        if not self.parts_converted:
            self.parts_converted = True
            self.convert_parts(model, self.options)

    def _after_plain_call(self, model: nn.Module, outcome: Outcome) -> None:
        """Convert the parts of a root that can't be recorded, and warn where there is no plan."""
        if outcome.plan is None and self.fit is None:
            self._check_strict(model, outcome)
            what = "nothing reversible was found, so it runs as it was, with all its activations"
            if outcome.untraceable:
                what = "its forward can't be recorded, so it runs as it was; its sub-modules are converted"
                self._convert_parts(model)
            self._warn(f"`convert({name_of(model)})`: {what}:\n{list_refusals(outcome.refusals)}")

    def _learnt(self, model: nn.Module, kind: Kind) -> None:
        """Raise, under `strict`, if something is left as it was; warn if nothing is dropped."""
        refusals = kind.found.refusals
        if self.options.strict and (refusals or not kind.units):
            node = refusals[0].op if refusals else None
            what = f"`convert({name_of(model)}, strict=True)`: left as it was"
            raise NotReversibleError(f"{what}:\n{list_refusals(refusals)}", node, refusals)
        if not kind.units:
            what = "nothing reversible was found, so it runs as it was, with all its activations"
            self._warn(f"`convert({name_of(model)})`: {what}:\n{list_refusals(refusals)}")

    def _warn(self, text: str) -> None:
        if text not in self.warned and not self.options.part:
            self.warned.add(text)
            warn(text, NotConvertedWarning)

    def call(self, model: nn.Module, args: Any, kwargs: Any) -> Any:
        """Return what the model's forward returns for these arguments."""
        forward = self.forward(model)
        if torch.compiler.is_compiling():
            return forward(*args, **kwargs)
        if self.block_calls is None:
            return self._run(model, args, kwargs)
        with self.block_calls.active():
            return self._run(model, args, kwargs)

    def call_method(self, model: nn.Module, function: FunctionType, args: Any, kwargs: Any) -> Any:
        """Return what a method returns; it is watched as the forward is, if it is given tensors."""
        method = functools.partial(function, model)
        if self.planned is None or is_watched():
            return method(*args, **kwargs)
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if not tensors or runs_plain(tensors) or sees_the_engine() or is_distributed([model], tensors):
            return method(*args, **kwargs)
        return self.planned.call(model, method, args, kwargs, name=function.__name__)

    def _run(self, model: nn.Module, args: Any, kwargs: Any) -> Any:
        leaves, spec = flattened(args, kwargs)
        if self.fit is not None and may_fit(leaves):
            return self.fit.call(model, self.to_fit(model, args, kwargs))
        return self._call(model, args, kwargs, leaves, spec)

    def compile_blocks(self, functions: Sequence[tuple[str, str, CompiledFunction]]) -> None:
        """Have blocks run compiled while the converted model runs; see `compiled.functions.compile_blocks`."""
        self.compiled_functions += functions
        self.block_calls = BlockCalls([(f.module, f) for *_, f in functions])

    def to_fit(self, model: nn.Module, args: Any, kwargs: Any) -> FitCall:
        """Return a call for a plan, with how the forward can be run."""
        leaves, spec = flattened(args, kwargs)

        def reversible(*args: Any, **kwargs: Any) -> Any:
            return self._call(model, args, kwargs, *flattened(args, kwargs))

        def is_reversible() -> bool:
            compiled = any(map(_torch.is_compiled, model.modules()))
            return not compiled and self.prepare(model, args, kwargs, leaves, spec).plan is not None

        runs = {"plain": store_activations()(self.forward(model)), "reversible": reversible}
        plain = [float if isinstance(x, float) else x for x in leaves]  # its plans stand on fractions by themselves
        key = (_call_key(plain), spec, ambient_state())
        return FitCall(args, kwargs, leaves, key, runs, is_reversible)

    def _call(self, model: nn.Module, args: Any, kwargs: Any, leaves: Sequence[Any], spec: Any) -> Any:
        forward = self.forward(model)
        tensors = [t for t in leaves if isinstance(t, Tensor)]
        plain = runs_plain(tensors)
        if self.planned is not None and not is_distributed([model], tensors):
            if plain or sees_the_engine():
                return forward(*args, **kwargs)
            return self.planned.call(model, forward, args, kwargs, functools.partial(self._learnt, model))
        stores = storing() and can_store(tensors)  # the same forward, compiled functions too
        if (plain and not stores) or _torch.has_global_module_hooks():
            return forward(*args, **kwargs)
        outcome = self.prepare(model, args, kwargs, leaves, spec)
        if outcome.plan is not None and (not outcome.once or self._is_known(outcome)):
            with contextlib.suppress(InvalidError):
                return outcome.plan.run(leaves, store=plain)
        try:
            result = forward(*args, **kwargs)
            if outcome.once and not self._is_known(outcome):
                outcome = self.prepare(model, args, kwargs, leaves, spec, ran=True)
            self._after_plain_call(model, outcome)
            if outcome.plan is None and self.place is not None:  # a part without a region
                table, name = self.place
                table[name] = self.unconverted(model)
            return result
        except BaseException:
            if outcome.untraceable:
                self._forget(outcome)
            raise

    def _is_known(self, outcome: Outcome) -> bool:
        return any(o is outcome for *_, o in self.outcomes)

    def _forget(self, refused: Outcome) -> None:
        """Forget a call that raised, recorded and for real: it tells nothing of the next one."""
        with self.lock:
            self.outcomes = [found for found in self.outcomes if found[-1] is not refused]


_LEAVES = frozenset({Tensor, nn.Parameter, *ATOMS})


def flattened(args: Any, kwargs: Any) -> tuple[Sequence[Any], Any]:
    """Return the leaves of some arguments and what tells their structures apart; quickly where none is a container."""
    leaves = [*args, *kwargs.values()]
    simple = _LEAVES.issuperset(map(type, leaves))
    return (leaves, (len(args), *kwargs)) if simple else _torch.flatten((args, kwargs))


def _objects(leaves: Sequence[Any]) -> tuple[Any, ...]:
    """Return the arguments that are neither tensors nor plain values, by what is in them."""
    return tuple([(i, key(x)) for i, x in enumerate(leaves) if not isinstance(x, (*ATOMS, Tensor))])


def _call_key(leaves: Sequence[Any]) -> tuple[Any, ...]:
    """Return what tells calls apart: tensors but for their numbers, which share memory, values, classes."""
    found: list[Any] = []
    memory: dict[int, int] = {}
    same: dict[int, int] = {}
    for i, x in enumerate(leaves):
        if isinstance(x, Tensor):
            strided = x.layout == torch.strided and not x.is_nested
            shared = memory.setdefault(_torch.storage_key(x), i) if strided and type(x) in (Tensor, nn.Parameter) else i
            first = same.setdefault(id(x), i)
            shape, layout = None if x.is_nested else tuple(x.shape), x.stride() if strided else x.layout
            found.append((shape, layout, x.dtype, x.device, x.requires_grad, type(x), x.is_conj(), shared, first))
        else:
            found.append(key(x) if isinstance(x, ATOMS) else type(x))
    return tuple(found)
