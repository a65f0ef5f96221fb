"""`convert`: the same model through another class, which runs its reversible regions without keeping their
activations.
"""

from __future__ import annotations

import copy
import functools
import threading
import warnings
from abc import ABCMeta
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from revfx import _torch
from revfx.ambient import ambient_state
from revfx.capture.guards import ATOMS, Change, is_gone, key, name_of
from revfx.capture.recorder import Spot
from revfx.capture.search import Outcome, Plan, make_plan
from revfx.compiled.dynamo import Compiled
from revfx.eager.modes import can_store, runs_plain, storing
from revfx.errors import NotReversibleError, Refusal, RevfxError, RevfxWarning
from revfx.passes.grid import checked_exact
from revfx.passes.plan import checked_every
from revfx.traced import free_couplings_of


MOST_PLANS = 32  # per model; the oldest one makes room for a new one


def convert(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    capture: str = "auto",
    strict: bool = False,
    exact: bool | int = False,
    anchor_every: int | None = None,
) -> nn.Module:
    """Return a module that computes what `model` does, with activation memory that does not grow with depth in its
    regions.

    It is the same model seen through another class: all attributes are shared, with parameters, buffers, sub-modules
    and hooks; `state_dict` keys, call signature, `train()`/`eval()`, `deepcopy` and pickling are the model's own. At
    its first call for given shapes, dtypes, `requires_grad` and training state the forward is recorded on fake
    tensors, regions whose values can be derived from their outputs are looked for, and from then on their activations
    are freed in the forward and regenerated, layer by layer, during the backward: `x1 = y1 - f(x2)` where the model
    computes `y1 = x1 + f(x2)`.

    Args:
        model: any module; it is not changed, and not run on real data for analysis.
        example_inputs: a tuple of arguments (or a dict of keyword arguments, or the only argument, a tensor) to make
            the plan for now.
        capture: how the forward is recorded. "fx": once, on fake tensors, which takes code that asks for no value of a
            tensor and leaves nothing behind. "dynamo": by `torch.compile`, at the first call, in as many graphs as it
            takes, run by eager kernels. It takes more, and gives up more: where a region was found the backward can't
            be differentiated again (`create_graph=True` raises and names the remedy), a module with backward hooks ends
            the graph, and under FSDP2 the model runs plainly. "auto": "fx" where it can; of a root that it can't
            record, "dynamo" if a region lies in the root's own code, else "fx" for its sub-modules.
        strict: raise for every part that is left as it was, rather than leave it; where `torch.compile` captures, raise
            if nothing reversible is found in any graph, after the first call.
        exact: make the regenerated activations those of the forward, bit for bit, and the gradients those of plain
            autograd over that forward: in regions what a coupling adds, and the streams that enter, are rounded to
            multiples of 2^-14 (2^-k for `exact=k`), which float32 has room for up to 1024 (2^(24-k)); beyond, and for
            numbers that are not finite, a RangeError is raised. Gradients pass through the rounding unchanged. Streams
            in half precision are carried in float32. Additive couplings keep nothing for it; momentum, and factors
            bounded from below by m, keep ceil(log2(ceil(1/m))) bits per element and coupling; others are refused. Where
            `torch.compile` captures, only calls that need gradients are rounded, and no streams in half precision.
        anchor_every: keep the activations before every so many couplings of a region as well (each line such as
            `x = x + f(y)` is one), from which the backward goes on: memory then grows with depth / anchor_every, and
            rounding only from one anchor to the next. None: only where rounding demands it.

    Raises:
        NotReversibleError: `strict` was given and something is left as it was.
        ValueError: an unknown `capture`; an `anchor_every` that is not positive; `example_inputs` for
            `capture="dynamo"`, which captures real calls only.

    Warns:
        RevfxWarning: nothing reversible was found; the text says why, and the model runs as it was. Also where "auto"
            does something else than "fx".
    """
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"`convert` takes an nn.Module, not a {type(model).__name__}.")
    if capture not in ("auto", "fx", "dynamo"):
        raise ValueError(f"`capture={capture!r}` is not known; use 'auto', 'fx' or 'dynamo'.")
    if capture == "dynamo" and example_inputs is not None:
        raise ValueError("`capture='dynamo'` captures the first real call; leave `example_inputs` out.")
    options = Options(capture, strict, anchor_every=checked_every(anchor_every), exact=checked_exact(exact))
    if isinstance(model, Reversible):
        if options in (model.revfx.options, Options("auto", False)):
            return model
        raise ValueError(
            f"`convert`: this {type(model).__name__} is converted already, with other options; convert the model that"
            " it was made of."
        )
    converted = _reversible(model, options)
    if example_inputs is not None:
        one = isinstance(example_inputs, torch.Tensor)
        args = (example_inputs,) if one else () if isinstance(example_inputs, dict) else tuple(example_inputs)
        kwargs = example_inputs if isinstance(example_inputs, dict) else {}
        converted.revfx.prepare(converted, args, kwargs)
    return converted


@dataclass(frozen=True)
class Options:
    """What `convert` was asked for; `part` is set for the sub-modules of a model that can't be recorded."""

    capture: str
    strict: bool
    part: bool = False
    anchor_every: int | None = None
    exact: int | None = None


class Conversion:
    """What a converted model knows: its options, and one outcome per kind of call.

    `compiled` stands in for outcomes where `torch.compile` captures the forward; `pending` is the outcome of a root
    that could not be recorded, until one call through `compiled` has shown whether that does better.
    """

    def __init__(self, forward: Callable[..., Any] | None, options: Options) -> None:
        self.own_forward, self.options = forward, options
        self.outcomes: list[tuple[Any, Any, Outcome]] = []  # with the kind of call, and the objects it was given
        self.lock = threading.RLock()
        self.warned: set[str] = set()
        self.carried, self.constant = frozenset[Spot](), frozenset[Spot]()  # numbers that change: inputs, or not
        self.parts_converted = False
        self.compiled: Compiled | None = None
        self.pending: Outcome | None = None
        self.place: tuple[dict[str, nn.Module | None], str] | None = None  # of a part: where its parent has it
        self.compiled_tried = False

    @property
    def plans(self) -> list[Plan]:
        """Return the plans made so far."""
        return [o.plan for *_, o in self.outcomes if o.plan is not None]

    @property
    def kept_cuts(self) -> int:
        """Return how many cuts the latest forward kept in its regions: two per region, and those that numerics
        demanded.
        """
        compiled = 0 if self.compiled is None else self.compiled.kept_cuts
        return compiled + sum(r.kept for p in self.plans for r in p.regions.values())

    @property
    def refusals(self) -> list[Refusal]:
        """Return what was left as it was, and why."""
        compiled = [] if self.compiled is None else self.compiled.refusals
        recorded = [r for *_, o in self.outcomes for r in o.refusals]
        return list(dict.fromkeys((*recorded, *compiled)))

    @property
    def code(self) -> str:
        """Return the rewritten programs as readable text."""
        compiled = [] if self.compiled is None or not self.compiled.graphs else [self.compiled.code]
        return "\n\n".join([*(p.code for p in self.plans), *compiled]) or "(no plan yet: it is made at the first call)"

    def forward(self, model: nn.Module) -> Callable[..., Any]:
        """Return the model's own forward."""
        if self.own_forward is not None:
            return self.own_forward
        return functools.partial(type(model)._revfx_base.forward, model)  # type: ignore[union-attr]

    def prepare(self, model: nn.Module, args: Any, kwargs: Any) -> Outcome:
        """Return the outcome for calls like this one, made now if there is none."""
        leaves, spec = _torch.flatten((args, kwargs))
        call = (_call_key(leaves), spec, ambient_state())
        objects = tuple([(i, key(x)) for i, x in enumerate(leaves) if not isinstance(x, (*ATOMS, Tensor))])
        with self.lock:
            why = Change("the shapes, types or values of its arguments")
            for known, given, outcome in reversed(self.outcomes):
                if known == call and (outcome.plan is None or given == objects):
                    change = outcome.stale()
                    if change is None:
                        return outcome
                    why = change
            self.outcomes = [(c, given, o) for c, given, o in self.outcomes if not is_gone(given)]
            if len(self.outcomes) >= MOST_PLANS:
                del self.outcomes[0]
                _torch.forget_shapes()
                self._warn(
                    f"`convert({name_of(model)})`: its forward is recorded again and again, now as {why.text} changed."
                    f" Only the {MOST_PLANS} newest plans are kept. What changes from call to call should be a tensor:"
                    " an argument or a buffer."
                )
            options = self.options
            make = functools.partial(
                make_plan, model, self.forward(model), args, kwargs, options.anchor_every, options.exact
            )
            outcome = make(self._carries(model, why))
            if outcome.plan is None and self.carried:
                self.carried, self.constant = frozenset[Spot](), self.constant | self.carried
                outcome = make(self.carried)
            self._report(model, outcome)
            self.outcomes.append((call, objects, outcome))
            return outcome

    def _carries(self, model: nn.Module, change: Change) -> frozenset[Spot]:
        """Return where a fraction hangs that changed, if it may be an input of plans instead of a constant."""
        if isinstance(getattr(change.module, change.name, None), float):
            found = {(path, change.name) for path, m in model.named_modules() if m is change.module}
            self.carried |= found - self.constant
        return self.carried

    def _report(self, model: nn.Module, outcome: Outcome) -> None:
        name = name_of(model)
        if outcome.untraceable and outcome.compiles and self._tries_compiled():
            self.pending, self.compiled = outcome, self._compile(model)
            return
        reasons = "\n  ".join(str(r) for r in outcome.refusals[:8]) or "no operation is inverted"
        if self.options.strict and (outcome.plan is None or outcome.refusals):
            node = outcome.refusals[0].op if outcome.refusals else None
            raise NotReversibleError(f"`convert({name}, strict=True)`: left as it was:\n  {reasons}", node)
        if outcome.untraceable and not self.parts_converted:
            self._convert_parts(model)
        if outcome.plan is None and not self.options.part:
            what = (
                "only its sub-modules are looked at"
                if outcome.untraceable
                else "nothing reversible was found, so it runs as it was"
            )
            self._warn(f"`convert({name})`: {what}:\n  {reasons}")

    def _warn(self, text: str) -> None:
        if text not in self.warned and not self.options.part:
            self.warned.add(text)
            warnings.warn(text, RevfxWarning, stacklevel=7)

    def _convert_parts(self, model: nn.Module) -> None:
        """Convert the largest sub-modules in the place of a root that can't be recorded."""
        self.parts_converted = True
        was, parts = unconverted(model), _parts(_torch.children(model), self.options)
        own = {**vars(model), "_modules": parts}  # the model that this was made of keeps its own
        bound = {k: v for k, v in own.items() if isinstance(v, MethodType) and v.__self__ is was}
        own.update({k: MethodType(v.__func__, model) for k, v in bound.items()})
        object.__setattr__(model, "__dict__", own)

    def _tries_compiled(self) -> bool:
        """Return whether `torch.compile` may capture what could not be recorded; it is asked once."""
        return self.options.capture == "auto" and not self.compiled_tried and not _torch.fsdp_in_use()

    def _compile(self, model: nn.Module) -> Compiled:
        self.compiled_tried = True
        own, name, options = self.own_forward, name_of(model), self.options
        forward = type(model)._revfx_base.forward if own is None else own  # type: ignore[union-attr]
        return Compiled(name, forward, options.anchor_every, options.exact)

    def _call_compiled(self, compiled: Compiled, model: nn.Module, args: Any, kwargs: Any) -> Any:
        result = compiled.call(model, (model, *args) if self.own_forward is None else args, kwargs)
        with self.lock:
            if self.pending is not None and (compiled.found or compiled.found_nothing):
                self._decide(model, compiled, self.pending)
            if compiled is self.compiled and compiled.found_nothing:
                self._report(model, Outcome(None, tuple(compiled.refusals)))
        return result

    def _decide(self, model: nn.Module, compiled: Compiled, recorded: Outcome) -> None:
        """Keep `compiled` where it frees what the sub-modules alone would not: they give up less."""
        self.pending = None
        if not compiled.in_own_code and not self.options.strict:
            self.compiled = None
            self._report(model, recorded)
        elif compiled.found:
            reasons = "\n  ".join(str(r) for r in recorded.refusals[:8])
            self._warn(
                f"`convert({name_of(model)})`: captured by `torch.compile` (see `capture`), as its forward"
                f" can't be recorded:\n  {reasons}"
            )

    def call(self, model: nn.Module, args: Any, kwargs: Any) -> Any:
        """Return what the model's forward returns for these arguments."""
        forward = self.forward(model)
        if torch.compiler.is_compiling():
            return forward(*args, **kwargs)
        leaves, _ = _torch.flatten((args, kwargs))
        tensors = [t for t in leaves if isinstance(t, Tensor)]
        plain = runs_plain(tensors)
        store = plain and (storing() or self.options.exact is not None) and can_store(tensors)
        if (plain and not store) or _torch.has_global_module_hooks():
            return forward(*args, **kwargs)
        if self.options.capture == "dynamo" and self.compiled is None:
            self.compiled = self._compile(model)
        outcome = None
        if self.compiled is None:
            outcome = self.prepare(model, args, kwargs)
            if outcome.plan is not None:
                return outcome.plan.run(leaves, store=plain)
        compiled = self.compiled
        try:
            if compiled is not None and not store:
                return self._call_compiled(compiled, model, args, kwargs)
            result = forward(*args, **kwargs)
            if outcome is not None and self.place is not None:  # a part that holds no region itself
                table, name = self.place
                table[name] = unconverted(model)
            return result
        except BaseException:
            if outcome is not None and outcome.untraceable:
                self._forget(outcome)
            raise

    def _forget(self, refused: Outcome) -> None:
        """Forget a call that raised, recorded and for real: it tells nothing of the next one, which is recorded
        again.
        """
        with self.lock:
            self.outcomes = [found for found in self.outcomes if found[-1] is not refused]
            if self.pending is refused:
                self.pending = self.compiled = None
                self.compiled_tried = False


class Reversible(nn.Module):
    """Base of the classes of converted models; `model.revfx` tells what was found: `.code`, `.plans`, `.refusals`.

    An object of such a class and the model that it was made of have one table of attributes: what knows that model,
    such as methods bound to it, lambdas and hooks, sees what becomes of this one. An object that others make of the
    class (`type(model)()`) runs plainly.
    """

    _revfx_base: type[nn.Module]
    _revfx: tuple[Conversion, nn.Module]  # with the model that it was made of; a slot

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Do nothing: the model's own class may register what is derived from it, or refuse it."""

    @property
    def revfx(self) -> Conversion:
        """Return what the conversion knows about this model."""
        conversion = _conversion(self)
        if conversion is None:
            raise RevfxError(f"this {type(self).__name__} was made by its class and not by `convert`; it runs plainly.")
        return conversion

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Load, and have plans look at the numbers of the weights again."""
        super()._load_from_state_dict(*args, **kwargs)
        conversion = _conversion(self)
        for plan in () if conversion is None else conversion.plans:
            plan.weights.due = True

    def _replicate_for_data_parallel(self) -> Any:
        """Return one of the replicas that `nn.DataParallel` makes at every step."""
        replica = super()._replicate_for_data_parallel()
        if (known := _known(self)) is not None:
            object.__setattr__(replica, "_revfx", known)
        return replica

    def __repr__(self) -> str:
        """Return the model's own text, and the rewritten programs."""
        conversion = _conversion(self)
        return super().__repr__() + ("" if conversion is None else f"\n{conversion.code}")

    def __copy__(self) -> Any:
        """Return the converted copy of the model, which is made by its own rules."""
        return _adopt(object.__new__(type(self)), copy.copy(unconverted(self)), _options(self))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Return how it is pickled and deeply copied: as the model, by its own rules, and the options; plans are made
        again at the first call.
        """
        plain = unconverted(self)
        if isinstance(plain, GraphModule):  # its class can't be found by name
            return _reversible, (plain, _options(self))
        return _unfilled, (self._revfx_base, "forward" in vars(plain)), (plain, _options(self))

    def __setstate__(self, state: Any) -> None:
        """Take what `__reduce_ex__` gives."""
        _adopt(self, *state)


def _deepcopy(self: Reversible, memo: dict[int, Any]) -> Any:
    made = memo[id(self)] = object.__new__(type(self))  # sub-modules may know it
    return _adopt(made, copy.deepcopy(unconverted(self), memo), _options(self))


def _known(module: Reversible) -> tuple[Conversion, nn.Module] | None:
    try:
        return object.__getattribute__(module, "_revfx")  # the model's own `__getattr__` may ask another model
    except AttributeError:
        return None


def _conversion(module: Reversible) -> Conversion | None:
    known = _known(module)
    return None if known is None else known[0]


def _options(module: Reversible) -> Options | None:
    conversion = _conversion(module)
    return None if conversion is None else conversion.options


@functools.cache
def _class_for(base: type[nn.Module], patched: bool) -> type[Any]:
    """Return the class of converted models of class `base`; `patched` ones have a forward of their own among their
    attributes.

    It goes by the name of the model's own class, which others look things up by, and write into checkpoints.
    """

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            free_couplings_of(self)
            return base.forward(self, *args, **kwargs)
        conversion = _conversion(self)
        return base.forward(self, *args, **kwargs) if conversion is None else conversion.call(self, args, kwargs)

    def found(self: Any) -> Any:
        own: Any = vars(self)["forward"]
        conversion = None if torch.compiler.is_compiling() else _conversion(self)
        if conversion is None or own is not conversion.own_forward:  # patched once more
            return own
        return functools.wraps(own)(lambda *args, **kwargs: conversion.call(self, args, kwargs))

    def replaced(self: Any, forward: Any) -> None:
        vars(self)["forward"] = forward

    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    members: dict[str, Any] = {"forward": property(found, replaced) if patched else forward, "_revfx_base": base}
    if hasattr(base, "__deepcopy__"):  # else there is none: a wrapper with a `__getattr__` would take it for its own
        members["__deepcopy__"] = _deepcopy
    kind: Any = type(base)  # neither it nor the base shall register the class
    make = ABCMeta.__new__ if issubclass(kind, ABCMeta) else type.__new__
    return make(kind, base.__name__, (Reversible, base), {**members, **names, "__slots__": ("_revfx",)})


def _reversible(model: nn.Module, options: Options | None) -> Any:
    return _adopt(_unfilled(type(model), "forward" in vars(model)), model, options)


def _unfilled(base: type[nn.Module], patched: bool) -> Any:
    return object.__new__(_class_for(base, patched))


def _adopt(made: Any, plain: nn.Module, options: Options | None) -> Any:
    """Return `made`, which is `plain` from now on; converted, if there are `options`."""
    object.__setattr__(made, "__dict__", vars(plain))
    for name in _slots(type(plain)):
        if hasattr(plain, name):
            object.__setattr__(made, name, getattr(plain, name))
    if options is not None:
        object.__setattr__(made, "_revfx", (Conversion(vars(plain).get("forward"), options), plain))
    _torch.share_fsdp_state(plain, made)
    return made


def _slots(kind: type) -> tuple[str, ...]:
    """Return the names of the slots of a class, as they are looked up from outside."""
    named = [(c.__name__.lstrip("_"), vars(c).get("__slots__", ())) for c in kind.__mro__]
    found = [(c, n) for c, names in named for n in ((names,) if isinstance(names, str) else names)]
    private = [f"_{c}{n}" if n.startswith("__") and not n.endswith("__") else n for c, n in found]
    return tuple(n for n in private if n not in ("__dict__", "__weakref__"))


def unconverted(model: nn.Module) -> nn.Module:
    """Return the model that a converted one was made of, which shares everything with it; other modules as they are."""
    if not isinstance(model, Reversible):
        return model
    known = _known(model)
    if known is not None and vars(known[1]) is vars(model):
        return known[1]
    plain = object.__new__(model._revfx_base)  # pyright: ignore[reportPrivateUsage]
    object.__setattr__(plain, "__dict__", vars(model))
    _torch.share_fsdp_state(model, plain)
    return plain


def _parts(children: dict[str, nn.Module | None], options: Options) -> dict[str, nn.Module | None]:
    """Return a table of sub-modules with what `_part` makes of them, which know their place in it."""
    table = {name: _part(m, options) for name, m in children.items()}
    for name, part in table.items():
        if part is not children[name] and isinstance(part, Reversible):
            part.revfx.place = table, name
    return table


def _part(module: nn.Module | None, options: Options) -> nn.Module | None:
    """Return a sub-module of a model that can't be recorded: converted if it is the user's own, looked into if it is a
    container.
    """
    if module is None or isinstance(module, (Reversible, torch.jit.ScriptModule)) or _torch.has_hooks(module):
        return module
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        twin = object.__new__(type(module))
        twin.__dict__.update(vars(module))
        twin.__dict__["_modules"] = _parts(_torch.children(module), options)
        return twin
    if type(module).__module__.startswith("torch.") and not isinstance(module, nn.Sequential):
        return module
    return (
        _reversible(module, replace(options, strict=False, part=True))
        if any(True for _ in module.children())
        else module
    )


def _call_key(leaves: list[Any]) -> tuple[Any, ...]:
    """Return shapes, dtypes, layout and `requires_grad` of tensors, which of them share memory; other arguments by
    value, or of objects by class.
    """
    found: list[Any] = []
    memory: dict[int, int] = {}
    same: dict[int, int] = {}
    for i, x in enumerate(leaves):
        if isinstance(x, Tensor):
            strided = x.layout == torch.strided and not x.is_nested
            shared = memory.setdefault(_torch.storage_key(x), i) if strided and type(x) in (Tensor, nn.Parameter) else i
            found.append(
                (
                    None if x.is_nested else tuple(x.shape),
                    x.stride() if strided else x.layout,
                    x.dtype,
                    x.device,
                    x.requires_grad,
                    type(x),
                    x.is_conj(),
                    shared,
                    same.setdefault(id(x), i),
                )
            )
        else:
            found.append(key(x) if isinstance(x, ATOMS) else type(x))
    return tuple(found)
