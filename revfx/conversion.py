"""The state of a converted model: its options, its plans, and its refusals."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from types import FunctionType
from typing import Any

import torch
from torch import nn

from revfx import _fake, _torch
from revfx.compiled.functions import CompiledFunction, Kernels
from revfx.errors import NotConvertedWarning, NotReversibleError, Reason, Refusal, list_refusals, name_of, warn
from revfx.fit.budget import Budget
from revfx.fit.budgeted import BudgetedModel
from revfx.info import ConversionInfo
from revfx.modes import allow_fakes, can_store, is_storing, runs_plain, sees_the_engine
from revfx.parts import BlockCalls, structure
from revfx.passes.sizes import mute_logger, tensors_of
from revfx.plan.couplings import Couplings
from revfx.plan.functions import functions_of
from revfx.plan.model import Kind, PlannedModel, is_watched
from revfx.plan.simulated import SimulatedModel, nothing_real
from revfx.world.fake import FakeWorld
from revfx.world.left import purge_fakes_after


@dataclass(frozen=True)
class Options:
    """The options of `convert`."""

    exact: bool = True
    strict: bool = False
    compile: bool = False
    memory: Budget | None = None


class Conversion:
    """The options of a converted model, and its plans.

    Args:
        forward: the forward among the model's own attributes, if there is one.
        options: of `convert`.

    Attributes:
        planned: the plans; None under a budget.
        budgeted: the plans under a budget; None without one.
        block_calls: compiled calls of parts of the model.
        compiled_functions: the functions that `compile=True` chose, with their names and places.
        uncompiled: refusals of `compile=True` before any function was chosen.
    """

    def __init__(self, forward: Callable[..., Any] | None, options: Options) -> None:
        self.own_forward: Callable[..., Any] | None = forward
        self.options: Options = options
        self.warned: set[str] = set()
        self.planned: PlannedModel | None = None
        self.budgeted: BudgetedModel | None = None
        if options.memory is None:
            self.planned = PlannedModel(options.exact, has_parts=options.compile)
        else:
            self.budgeted = BudgetedModel(options.memory)
        self.block_calls: BlockCalls | None = None
        self.compiled_functions: list[tuple[str, str, CompiledFunction]] = []
        self.uncompiled: list[Refusal] = []

    @property
    def couplings(self) -> list[Couplings]:
        """The regions found so far, of each kind of call."""
        if self.planned is None:
            return []
        return [kind.found for kind in self.planned.kinds.values() if kind.units]

    @property
    def coded_bytes(self) -> int:
        """The bytes of the codes of the latest forward."""
        return 0 if self.planned is None else self.planned.coded_bytes

    @property
    def info(self) -> ConversionInfo:
        """The findings so far, as frozen data."""
        if self.budgeted is not None:
            plans = self.budgeted.budget_plans
            no_plan = "no plan now: the next training step makes one"
            refusals = (*self.budgeted.refusals, *self.not_compiled)
            return ConversionInfo((), refusals, plans, _format_plans(plans, no_plan))
        assert self.planned is not None
        plans = tuple(kind.info for kind in self.planned.kinds.values() if kind.units)
        refusals = tuple(dict.fromkeys((*self.planned.refusals, *self.not_compiled)))
        no_plan = "no plan yet: the first call makes it"
        if self.planned.kinds:
            no_plan = "no plan: nothing reversible was found; `.refusals` lists the reasons"
        regions = tuple(chain.from_iterable(plan.regions for plan in plans))
        return ConversionInfo(regions, refusals, plans, _format_plans(plans, no_plan))

    @property
    def not_compiled(self) -> list[Refusal]:
        """The parts that `compile=True` could not compile so far, with reasons."""
        found = [*self.uncompiled]
        for name, where, function in self.compiled_functions:
            if function.kernels.failed is not None:
                detail = f"`{name}` is not compiled: {function.kernels.failed}"
                found.append(Refusal(Reason.NOT_COMPILED, (name,), where, detail))
        return found

    def forward(self, model: nn.Module) -> Callable[..., Any]:
        """Return the model's own forward."""
        if self.own_forward is not None:
            return self.own_forward
        return functools.partial(type(model)._revfx_base.forward, model)  # type: ignore[union-attr]

    def _report_refusals(self, model: nn.Module, kind: Kind) -> None:
        """Raise under `strict` if a part is left as it was; warn if no tensor is dropped."""
        refusals = kind.found.refusals
        if self.options.strict and (refusals or not kind.units):
            node = refusals[0].op if refusals else None
            text = f"`convert({name_of(model)}, strict=True)`: left as it was"
            raise NotReversibleError(f"{text}:\n{list_refusals(refusals)}", node, refusals)
        if not kind.units:
            text = "nothing reversible was found, so it runs as it was, with all its activations"
            self._warn(f"`convert({name_of(model)})`: {text}:\n{list_refusals(refusals)}")

    def _warn(self, text: str) -> None:
        if text not in self.warned:
            self.warned.add(text)
            warn(text, NotConvertedWarning)

    def call(self, model: nn.Module, args: Any, kwargs: Any) -> Any:
        """Return the result of the model's forward for these arguments."""
        forward = self.forward(model)
        if torch.compiler.is_compiling():
            return forward(*args, **kwargs)
        if self.planned is not None and self.options.compile and self.block_calls is None:
            self._compile_functions(model, forward, args, kwargs)
        if self.block_calls is None:
            return self._run(model, args, kwargs)
        with self.block_calls.active():
            return self._run(model, args, kwargs)

    def call_method(self, model: nn.Module, function: FunctionType, args: Any, kwargs: Any) -> Any:
        """Return the result of a method; if it gets tensors, it runs under a plan as the forward does."""
        method = functools.partial(function, model)
        if self.planned is None or is_watched():
            return method(*args, **kwargs)
        tensors = tensors_of((args, kwargs))
        if not tensors or runs_plain(tensors) or sees_the_engine():
            return method(*args, **kwargs)
        return self.planned.call(model, method, args, kwargs, name=function.__name__)

    def _run(self, model: nn.Module, args: Any, kwargs: Any) -> Any:
        if self.budgeted is not None:
            return self.budgeted.call(model, self.forward(model), args, kwargs)
        forward = self.forward(model)
        if self.planned is None or runs_plain(tensors_of((args, kwargs))) or sees_the_engine():
            return forward(*args, **kwargs)
        return self.planned.call(model, forward, args, kwargs, functools.partial(self._report_refusals, model))

    def compile_blocks(self, functions: Sequence[tuple[str, str, CompiledFunction]]) -> None:
        """Have blocks run compiled while the converted model runs; see `compiled.functions.compile_blocks`."""
        self.compiled_functions += functions
        self.block_calls = BlockCalls([(f.module, f) for *_, f in functions])

    def _compile_functions(self, model: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> None:
        """Have the functions of couplings run compiled from now on, if this call frees activations."""
        tensors = tensors_of((args, kwargs))
        if (runs_plain(tensors) and not is_storing()) or not can_store(tensors):
            return
        functions: list[tuple[str, str, CompiledFunction]] = []
        kernels = defaultdict[Any, Kernels](Kernels)
        try:
            found = functions_of(self._simulate(model, forward, args, kwargs), model)
        except Exception as e:  # the model's own, or of fake tensors, which have no numbers to read
            found = {}
            detail = f"its functions are not compiled: on fake tensors it raises {type(e).__name__}"
            self.uncompiled = [Refusal(Reason.NOT_COMPILED, (name_of(model),), "", detail)]
        for path, where in found.items():
            module = model.get_submodule(path)
            if not _torch.is_compiled(module):
                functions.append((path, where, CompiledFunction(module, kernels[structure(module)])))
        self.compile_blocks(functions)

    def _simulate(self, model: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Couplings:
        """Find the couplings of a forward on fake tensors.

        Raises:
            Exception: the forward's own, or of fake tensors.
        """
        planned = SimulatedModel(self.options.exact)
        world = FakeWorld(model, args, kwargs, whole=True)
        planned.real_of = world.real_of
        with mute_logger(_fake.FAKE_LOGGER), purge_fakes_after(world.mode):
            try:
                with world.entered() as given, allow_fakes(), torch.enable_grad():
                    planned.call(model, forward, *given)
            finally:  # else the plans would hold the arguments of this call
                planned.real_of = nothing_real
                world.fakes.clear()
        return [*planned.kinds.values()][-1].found


def _format_plans(plans: Sequence[Any], no_plan: str) -> str:
    return "\n\n".join(map(str, plans)) or f"({no_plan})"
