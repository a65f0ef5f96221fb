"""Recording the tape of a training step on fake tensors: the user's Python runs once, and nothing is allocated.

Code that asks for numbers, or that no fake tensors pass, runs on real ones, of which autograd keeps none: the backward
runs on zeros in their place, and its results are thrown away.
"""

from __future__ import annotations

import contextlib
import traceback
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from revfx import _fake, _fsdp, _torch
from revfx.ambient import given
from revfx.errors import RevfxError
from revfx.fit.compiled import Back, Bracket, Gradients, StateOf, Whole
from revfx.fit.numbers import differing
from revfx.fit.tape import Memory, Op, Pack, Spot, Tape
from revfx.modes import simulating
from revfx.parts import Part, looking_on, parts_of
from revfx.passes._torch import draws, writes
from revfx.passes.sizes import muted, tensors_of
from revfx.world.fake import RealWorld, World
from revfx.world.left import none_left
from revfx.world.values import is_plain


CODES = 4  # bits an element, of what is inverted: many take two, but a budget is to hold
NUDGE = 1e-6  # relative: what numbers of the data are off by when a forward is recorded once more


Source = tuple[str, Any, int | None]  # a kind of tensor, where to find it, and the storage of the original
UNKNOWN: Source = ("", None, None)


@dataclass(eq=False)
class _Kept:
    """What autograd holds in the place of a tensor."""

    number: int


class Recorder(TorchDispatchMode):
    """Notes operators, memory and what autograd keeps, while it is active; with no `mode`, on real tensors.

    `nudged`: what operators make of parameters and arguments is off by a little, and so are all numbers of the data.
    """

    def __init__(
        self, mode: _fake.FakeMode | None, sources: Mapping[int, Source], model: nn.Module, nudged: bool
    ) -> None:
        super().__init__()
        self.mode, self.sources, self.nudged = mode, sources, nudged
        named = dict(model.named_modules())
        self.names = {id(m): name for name, m in named.items()}
        sharded = sorted((n for n, m in named.items() if n and _fsdp.is_sharded(m)), key=len, reverse=True)
        self.tape = Tape(sharded=tuple(sharded))
        self.known: dict[int, tuple[int, Any]] = {}  # by storage: the memory, or -1 - a pack, and a reference
        self.turns, self.moment = 0, -1  # how much was read; before which operator autograd kept or read last
        self.watched: list[weakref.ref[_Kept]] = []
        self.calls, self.cached = 0, torch.is_autocast_cache_enabled()  # compiled ones that were called, and how
        self.held: list[Tensor] | None = None  # what is there until the one that runs has ended

    # --- memory
    def spot(self, t: Tensor, made: bool = False) -> Spot | None:
        """Return where a tensor lies, the double of a pack where that does; None if its layout is not strided."""
        if t.layout != torch.strided or t.is_nested:
            return None
        key = _torch.storage_key(t)
        if key not in self.known:
            self._enter(t, key, made)
        memory, offset = self.known[key][0], int(t.storage_offset())
        if memory < 0:
            packed = self.tape.packs[-1 - memory].spot
            assert packed is not None
            value, offset = packed.value, offset + packed.offset
        else:
            value = self.tape.memories[memory].values[-1]
        return Spot(value, t.dtype, tuple(t.shape), tuple(t.stride()), offset)

    def _enter(self, t: Tensor, key: int, made: bool) -> None:
        storage, number = t.untyped_storage(), len(self.tape.memories)
        memory = Memory(storage.nbytes(), t.device, len(self.tape.ops))
        if not made:
            kind, where, memory.storage = self.sources.get(key, UNKNOWN)
            memory.source = kind, where
        self.tape.memories.append(memory)
        self._value(number, len(self.tape.ops) if made else None)
        self.known[key] = number, weakref.ref(storage, lambda _: self._leave(key, memory))

    def _leave(self, key: int, memory: Memory) -> None:
        memory.end = self._slot()
        del self.known[key]

    def _slot(self) -> int:
        """Return from which slot on what goes now is not there."""
        return 2 * len(self.tape.ops) + (self.moment == len(self.tape.ops))

    def kind(self, spot: Spot) -> str | None:
        """Return what was there before the step: "parameter", say; None of what the step has made."""
        source = self.tape.memory(spot.value).source
        return None if source is None else source[0]

    def _value(self, memory: int, op: int | None) -> int:
        self.tape.memories[memory].values.append(len(self.tape.memory_of))
        self.tape.memory_of.append(memory)
        self.tape.made_by.append(op)
        return len(self.tape.memory_of) - 1

    # --- operators
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given, spec = pytree.tree_flatten((args, kwargs))
        spots = [self.spot(t) if isinstance(t, Tensor) else t for t in given]
        written = _written(func, args, kwargs) if writes(func) else ()
        old = tuple([s for t in written if (s := self.spot(t)) is not None])
        if self.mode is None and any(self.kind(s) == "parameter" for s in old):
            raise RevfxError("it asks for numbers, and writes to a parameter.")
        out = func(*args, **kwargs)
        owned = {_torch.storage_key(t) for t in given if isinstance(t, Tensor) and t.layout == torch.strided}
        made = [t for t in tensors_of(out) if t.layout == torch.strided and _torch.storage_key(t) not in owned]
        if not made and not writes(func):
            return out  # views, or no tensors
        for at, (t, spot) in enumerate(zip(given, spots, strict=True)):
            if isinstance(spot, Spot) and (k := self.known[_torch.storage_key(t)][0]) < 0:
                self.tape.reads.setdefault(-1 - k, set()).add((len(self.tape.ops), at))
        before = len(self.tape.memory_of)
        for s in old:
            self._value(self.tape.memory_of[s.value], len(self.tape.ops))
        outs = tuple([self.spot(t, made=True) if isinstance(t, Tensor) else None for t in pytree.tree_leaves(out)])
        args_of, kwargs_of = pytree.tree_unflatten(spots, spec)
        reads, makes = tuple([s for s in spots if isinstance(s, Spot)]), tuple(range(before, len(self.tape.memory_of)))
        if not old and any(self.kind(s) is not None for s in reads):
            self._nudge(made)
        drawn = draws(func, args, kwargs)
        self.tape.ops.append(Op(func, tuple(args_of), kwargs_of, reads, outs, old, makes, drawn, *self._where()))
        return out

    def _nudge(self, made: Sequence[Tensor]) -> None:
        with _torch.no_modes(), torch.no_grad():
            for t in made if self.nudged else ():
                if t.is_floating_point():
                    t.mul_(1 + NUDGE)

    def part(self, part: Part, args: Any, kwargs: Any) -> Any:
        """Return what a compiled part returns; it is noted as one operator, and so is its backward."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = tensors_of(leaves)
        whole, versions = Whole.of(part, leaves, spec, self.cached), [_torch.version(t) for t in tensors]
        spots = [self.spot(t) if isinstance(t, Tensor) else t for t in leaves]
        self.tape.packs += [Pack(self.spot(t), len(self.tape.ops), offered=True) for t in tensors]
        operands, where = (StateOf(self.calls), *spots), (self.names.get(id(part.module), ""), self._where()[1])
        self.calls += 1
        backward, results = list[Gradients](), list[Any]()

        def run() -> Sequence[Tensor]:
            result, gradients = whole.run(leaves)
            backward.append(gradients)
            results.append(result)
            return tensors_of(result)

        def back(of: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
            given = [None if g is None else self.spot(g) for g in of]
            return self._as_one(Back(whole), (*operands, *given), where, lambda: backward[0](of))

        needing = [t for t in (*tensors, *part.module.parameters()) if t.requires_grad]
        outs = Bracket.apply(lambda: self._as_one(whole, operands, where, run), back, *needing)
        if versions != [_torch.version(t) for t in tensors]:
            raise RevfxError(f"`{where[0]}`, which is compiled, writes to its arguments.")
        if len(outs) != len(tensors_in(results[0])):
            raise RevfxError(f"`{where[0]}`, which is compiled, returns tensors in an object of its own.")
        owned, made = {_torch.storage_key(t) for t in tensors}, iter(outs)
        self._nudge([t for t in outs if _torch.storage_key(t) not in owned])
        return pytree.tree_map_only(Tensor, lambda _: next(made), results[0])

    def _as_one(self, func: Any, operands: tuple[Any, ...], where: tuple[str, str], run: Callable[[], Any]) -> Any:
        """Return the tensors that `run` returns, noted as results of one operator, as is what autograd keeps of it."""
        before, first, self.held = len(self.tape.memory_of), len(self.tape.packs), []
        torch.set_autocast_cache_enabled(self.cached)
        try:
            with _torch.no_dispatch():
                results = run()
                made = [None if t is None else self.spot(t, made=True) for t in results]
                outs = (*[p.spot for p in self.tape.packs[first:]], *made)
                makes = tuple([v for v in range(before, len(self.tape.memory_of)) if self.tape.made_by[v] is not None])
                reads = tuple([s for s in operands if isinstance(s, Spot)])
                self.tape.ops.append(Op(func, operands, {}, reads, outs, (), makes, False, *where))
                return results
        finally:
            torch.set_autocast_cache_enabled(False)
            self.held = None

    def _where(self) -> tuple[str, str]:
        """Return the innermost module that runs, and the line in its forward; in the backward autograd's name."""
        node = _torch.backward_node()
        if node is not None:
            return "", node.name()
        for frame, line in traceback.walk_stack(_torch.caller()):
            name = self.names.get(id(frame.f_locals.get("self"))) if frame.f_code.co_name == "forward" else None
            if name is not None:
                return name, f"{frame.f_code.co_filename}:{line}"
        return "", ""

    # --- autograd
    @_torch.uncompiled
    def pack(self, t: Tensor) -> Any:
        """Return what autograd is to hold in the place of `t`."""
        made = self.held is not None and _torch.storage_key(t) not in self.sources
        spot, packs, self.moment = self.spot(t, made), self.tape.packs, len(self.tape.ops)
        packs.append(pack := Pack(spot, len(self.tape.ops), module=self._where()[0] if self.tape.sharded else ""))
        if spot is None or isinstance(t, nn.Parameter):
            pack.spot = None
            return t
        if self.held is not None:
            self.held.append(t)
        kept = _Kept(len(packs) - 1)
        self.watched.append(weakref.ref(kept, lambda _: setattr(pack, "end", self._slot())))
        return kept

    @_torch.uncompiled
    def unpack(self, kept: Any) -> Tensor:
        """Return what autograd reads: zeros, in memory of their own."""
        if not isinstance(kept, _Kept):
            return kept
        pack, self.moment = self.tape.packs[kept.number], len(self.tape.ops)
        if pack.unpacked is None:
            pack.unpacked, pack.turn = len(self.tape.ops), self.turns
            self.turns += 1
        spot = pack.spot
        assert spot is not None
        with _torch.no_modes(), self.mode or contextlib.nullcontext():
            device = self.tape.memory(spot.value).device
            double = torch.empty_strided(spot.shape, spot.stride, dtype=spot.dtype, device=device).zero_()
        key = _torch.storage_key(double)

        def released(_: Any) -> None:
            pack.end = self._slot()
            del self.known[key]

        self.known[key] = -1 - kept.number, weakref.ref(double.untyped_storage(), released)
        if self.held is not None and self.tape.made_by[spot.value] != pack.packed:  # what it made itself goes earlier
            self.held.append(double)
        return double


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """Return the tensors among the arguments that an operator writes."""
    names = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    given = {**{a.name: x for a, x in zip(func._schema.arguments, args, strict=False)}, **kwargs}
    return [t for n in names for t in tensors_of(given.get(n))]


def record(model: nn.Module, run: Callable[..., Any], args: Any, kwargs: Any) -> Tape:
    """Return the tape of `run(*args, **kwargs)`, which calls `model`, and of its backward.

    Raises:
        RevfxError: it is compiled as a whole, or its parameters are spread by others than FSDP2.
        Exception: whatever the model raises.
    """
    compiled, sharded = parts_of(model), any(map(_fsdp.is_sharded, model.modules()))
    if any(map(_torch.is_dtensor, model.parameters())) and not sharded:
        raise RevfxError("its parameters are spread over processes, and not by FSDP2.")
    if compiled and sharded:
        raise RevfxError(f"FSDP2 gathers parameters, and `{compiled[0]}` is compiled: leave it uncompiled.")
    if not compiled:
        try:
            return _record(World(model, args, kwargs, whole=True), run)
        except Exception as e:  # it asks for numbers, or no fake tensors pass
            if isinstance(e, RevfxError):
                raise
    tape, nudged = (_record(RealWorld(model, args, kwargs), run, n) for n in (False, True))
    tape.varies = differing(tape, nudged) or frozenset()  # what is given other numbers if the data are others
    return tape


def _record(world: World, run: Callable[..., Any], nudged: bool = False) -> Tape:
    real = isinstance(world, RealWorld)
    with contextlib.ExitStack() as stack:
        contexts = none_left(world.mode), muted(_fake.FAKE_LOGGER), _torch.uncollected(), simulating(CODES)
        for context in (*contexts, torch.enable_grad(), torch.random.fork_rng(enabled=real)):
            stack.enter_context(context)
        stack.callback(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled())
        stack.callback(world.fakes.clear)
        try:
            return _step(world, nudged, run, *stack.enter_context(world.entered()))
        except Exception as e:
            if not real:  # its frames hold fake tensors, and so do their tables of names; real ones are tried next
                traceback.clear_frames(e.__traceback__)
                _ = [frame.f_locals for frame, _ in traceback.walk_tb(e.__traceback__)]  # are made anew
            raise


def _step(world: World, nudged: bool, run: Callable[..., Any], args: Any, kwargs: Any) -> Tape:
    mode, model = None if isinstance(world, RealWorld) else world.mode, world.model
    recorder = Recorder(mode, _sources(world, args, kwargs), model, nudged)
    tape = recorder.tape
    torch.set_autocast_cache_enabled(False)  # it would hold casts of what stands for parameters
    with recorder:
        with given(looking_on, recorder), saved_tensors_hooks(recorder.pack, recorder.unpack):
            result = run(*args, **kwargs)
        tape.turn = len(tape.ops)
        outs = [t for t in tensors_in(result) if t.requires_grad]
        outs = [t for t in outs if not t.dim()] or outs  # where there is a loss, it is what is differentiated
        if not outs and tape.packs:
            raise RevfxError("the forward returns no tensor that needs a gradient, as far as can be seen.")
        if outs:
            torch.autograd.backward(outs, [torch.ones_like(t) for t in outs])
    for op in tape.ops[: tape.turn] if _torch.in_autocast() else ():  # which holds casts of parameters until its end
        if op.func == torch.ops.aten._to_copy.default and recorder.kind(op.reads[0]) == "parameter" and op.makes:
            memory = tape.memory(op.makes[0])
            memory.end = max(memory.end or 0, 2 * tape.turn + 1)
    left = [m for m in tape.memories if m.end is None and m.source is None]
    tape.loss = sum(t.nbytes for t in outs if t.dim())
    del result, outs
    for m in left:
        if m.end is not None and m.born < tape.turn:
            m.returned, m.end = True, 2 * max(tape.turn, m.born + 1) + 1
    return tape


def tensors_in(result: Any, depth: int = 3) -> list[Tensor]:
    """Return the tensors in what a forward returns: in containers, and in the attributes of plain objects."""
    leaves = pytree.tree_leaves(result)
    inner = [vars(x) for x in leaves if depth and is_plain(x) and not isinstance(x, Tensor)]
    return [t for t in leaves if isinstance(t, Tensor)] + [t for x in inner for t in tensors_in(x, depth - 1)]


def _sources(world: World, args: Any, kwargs: Any) -> dict[int, Source]:
    """Return where to find the tensors that are there before the step, by the storages of their stand-ins."""
    found: dict[int, Source] = {}
    originals = {id(stand_in): t for t, stand_in in world.fakes.values()}

    def enter(kind: str, where: Any, t: Any) -> None:
        # spots in a stand-in are spots in the original if both count from their first elements
        if isinstance(t, Tensor) and t.layout == torch.strided and not t.storage_offset():
            storage = _torch.storage_key(originals.get(id(t), t))
            found.setdefault(_torch.storage_key(t), (kind, where, storage))

    for i, t in enumerate(pytree.tree_leaves((args, kwargs))):
        enter("argument", i, t)
    for path, module in world.model.named_modules():
        for kind, table in (("parameter", _torch.parameters(module)), ("buffer", _torch.buffers(module))):
            for name, t in table.items():
                enter(kind, (path, name), t)
                enter("gradient", None, None if t is None else t.grad)
    return found
