"""Recording the tape of a training step on fake tensors: the user's Python runs once, and nothing is allocated."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from revfx import _fake, _torch
from revfx.capture.effects import none_left
from revfx.capture.guards import is_plain
from revfx.eager.modes import simulating
from revfx.errors import RevfxError
from revfx.fit.asked import Shape, answers, asks
from revfx.fit.numbers import differing
from revfx.fit.tape import Memory, Op, Pack, Spot, Tape
from revfx.passes._torch import draws, writes
from revfx.passes.sizes import muted, tensors_of
from revfx.world import World


class _Kept:
    """What autograd holds in the place of a tensor; the double is read in its place, in memory of its own."""

    def __init__(self, double: Tensor) -> None:
        self.double = double


class Recorder(TorchDispatchMode):
    """Notes operators, memory and what autograd keeps, while it is active."""

    def __init__(
        self, mode: _fake.FakeMode, sources: Mapping[int, tuple[str, Any]], model: nn.Module, asked: list[Any] | None
    ) -> None:
        super().__init__()
        self.mode, self.sources, self.asked = mode, sources, asked
        self.names = {id(m): name for name, m in model.named_modules()}
        self.memories, self.memory_of, self.made_by = list[Memory](), list[int](), list[int | None]()
        self.ops, self.packs = list[Op](), list[Pack]()
        self.known: dict[int, tuple[int, Any]] = {}  # by storage: the memory, or -1 - a pack, and a reference
        self.reads: dict[int, set[tuple[int, int]]] = {}
        self.turns = 0

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
            packed = self.packs[-1 - memory].spot
            assert packed is not None
            value, offset = packed.value, offset + packed.offset
        else:
            value = self.memories[memory].values[-1]
        return Spot(value, t.dtype, tuple(t.shape), tuple(t.stride()), offset)

    def _enter(self, t: Tensor, key: int, made: bool) -> None:
        storage, number = t.untyped_storage(), len(self.memories)
        source = None if made else self.sources.get(key, ("", None))
        memory = Memory(storage.nbytes(), t.device, len(self.ops), source=source)
        self.memories.append(memory)
        self._value(number, len(self.ops) if made else None)
        self.known[key] = number, weakref.ref(storage, lambda _: self._leave(key, memory))

    def _leave(self, key: int, memory: Memory) -> None:
        memory.dead = len(self.ops)
        del self.known[key]

    def _value(self, memory: int, op: int | None) -> int:
        self.memories[memory].values.append(len(self.memory_of))
        self.memory_of.append(memory)
        self.made_by.append(op)
        return len(self.memory_of) - 1

    # --- operators
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given, spec = pytree.tree_flatten((args, kwargs))
        spots = [self.spot(t) if isinstance(t, Tensor) else t for t in given]
        out = func(*args, **kwargs) if self.asked is None or not asks(func) else self._answer()
        tensors = [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]
        owned = {_torch.storage_key(t) for t in given if isinstance(t, Tensor) and t.layout == torch.strided}
        if (
            not writes(func)
            and tensors
            and all(_torch.storage_key(t) in owned for t in tensors if t.layout == torch.strided)
        ):
            return out  # a view
        if not tensors and not writes(func):
            return out
        self._note_packs(given)
        before = len(self.memory_of)
        written = _written(func, args, kwargs) if writes(func) else ()
        old = tuple([s for t in written if (s := self.spot(t)) is not None])
        for s in old:
            self._value(self.memory_of[s.value], len(self.ops))
        outs = tuple([self.spot(t, made=True) if isinstance(t, Tensor) else None for t in pytree.tree_leaves(out)])
        args_of, kwargs_of = pytree.tree_unflatten(spots, spec)
        reads, makes = tuple([s for s in spots if isinstance(s, Spot)]), tuple(range(before, len(self.memory_of)))
        drawn = draws(func, args, kwargs)
        self.ops.append(Op(func, tuple(args_of), kwargs_of, reads, outs, old, makes, drawn, *self._where()))
        return out

    def _answer(self) -> Any:
        """Return what an operator gave for real whose result no fake tensors tell."""
        if not self.asked:
            raise RevfxError("the forward asks for other values than when it ran before, for real.")

        def made(t: Any) -> Any:
            return torch.empty_strided(t.size, t.stride, dtype=t.dtype, device=t.device) if isinstance(t, Shape) else t

        with _torch.no_modes(), self.mode:
            return pytree.tree_map(made, self.asked.pop(0))

    def _where(self) -> tuple[str, str]:
        """Return the innermost module that runs, and the line in its forward; in the backward autograd's name."""
        node = _torch.backward_node()
        if node is not None:
            return "", node.name()
        frame = _torch.caller()
        while frame is not None:
            name = self.names.get(id(frame.f_locals.get("self"))) if frame.f_code.co_name == "forward" else None
            if name is not None:
                return name, f"{frame.f_code.co_filename}:{frame.f_lineno}"
            frame = frame.f_back
        return "", ""

    def _note_packs(self, given: list[Any]) -> None:
        for at, t in enumerate(given):
            if isinstance(t, Tensor) and t.layout == torch.strided:
                known = self.known.get(_torch.storage_key(t))
                if known is not None and known[0] < 0:
                    self.reads.setdefault(-1 - known[0], set()).add((len(self.ops), at))

    # --- autograd
    def pack(self, t: Tensor) -> Any:
        """Return what autograd is to hold in the place of `t`."""
        spot = self.spot(t)
        if spot is None or isinstance(t, nn.Parameter):
            self.packs.append(Pack(None, len(self.ops)))
            return t
        with _torch.no_modes(), self.mode:
            double = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
        number, pack = len(self.packs), Pack(spot, len(self.ops))
        storage = double.untyped_storage()
        key = _torch.storage_key(double)

        def released(_: Any) -> None:
            pack.released = len(self.ops)
            del self.known[key]

        self.known[key] = -1 - number, weakref.ref(storage, released)
        self.packs.append(pack)
        return _Kept(double)

    def unpack(self, kept: Any) -> Tensor:
        """Return what autograd reads."""
        if not isinstance(kept, _Kept):
            return kept
        pack = self.packs[-1 - self.known[_torch.storage_key(kept.double)][0]]
        if pack.unpacked is None:
            pack.unpacked, pack.turn = len(self.ops), self.turns
            self.turns += 1
        return kept.double


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """Return the tensors among the arguments that an operator writes."""
    schema = func._schema.arguments
    names = {a.name: i for i, a in enumerate(schema)}
    given = [*((schema[i], a) for i, a in enumerate(args)), *((schema[names[n]], a) for n, a in kwargs.items())]
    found = [t for s, a in given if s.alias_info is not None and s.alias_info.is_write for t in tensors_of(a)]
    return found


def record(model: nn.Module, run: Callable[..., Any], args: Any, kwargs: Any) -> Tape:
    """Return the tape of `run(*args, **kwargs)`, which calls `model`, and of its backward.

    Raises:
        Exception: whatever the model raises; of code that asks for values, one of torch's for fake tensors.
    """
    try:
        return _record(model, run, args, kwargs, None)
    except _fake.DATA_DEPENDENT:
        found = answers(model, run, args, kwargs)
    tape = _record(model, run, args, kwargs, [*found])
    if any(isinstance(x, float) for x in found):  # numbers of data: whatever is given others if these are, varies
        others = [x * (1 + 1e-6) if isinstance(x, float) else x for x in found]
        tape.varies = differing(tape, _record(model, run, args, kwargs, others)) or frozenset()
    return tape


def _record(model: nn.Module, run: Callable[..., Any], args: Any, kwargs: Any, asked: list[Any] | None) -> Tape:
    world = World(model, args, kwargs, whole=True)
    with none_left(world.mode), muted(_fake.FAKE_LOGGER), _torch.uncollected(), simulating(), torch.enable_grad():
        try:
            with world.entered() as (fake_args, fake_kwargs):
                recorder = Recorder(world.mode, _sources(model, fake_args, fake_kwargs), model, asked)
                return _step(recorder, run, fake_args, fake_kwargs)
        finally:
            world.fakes.clear()


def _step(recorder: Recorder, run: Callable[..., Any], args: Any, kwargs: Any) -> Tape:
    with recorder:
        with saved_tensors_hooks(recorder.pack, recorder.unpack):
            result = run(*args, **kwargs)
        turn = len(recorder.ops)
        outs = [t for t in tensors_in(result) if t.requires_grad]
        outs = [t for t in outs if not t.dim()] or outs  # where there is a loss, it is what is differentiated
        if not outs and recorder.packs:
            raise RevfxError("the forward returns no tensor that needs a gradient, as far as can be seen.")
        if outs:
            torch.autograd.backward(outs, [torch.ones_like(t) for t in outs])
    left = [m for m in recorder.memories if m.dead is None and m.source is None]
    loss = sum(t.numel() * t.element_size() for t in outs if t.dim())
    del result, outs
    returned = [m for m in left if m.dead is not None and m.born < turn]
    for m in returned:
        m.dead = max(turn, m.born + 1)
    return Tape(
        recorder.memories, recorder.memory_of, recorder.made_by, recorder.ops, recorder.packs, turn, recorder.reads,
        returned, loss,
    )  # fmt: skip


def tensors_in(result: Any, depth: int = 3) -> list[Tensor]:
    """Return the tensors in what a forward returns: in containers, and in the attributes of plain objects."""
    leaves = pytree.tree_leaves(result)
    inner = [vars(x) for x in leaves if depth and is_plain(x) and not isinstance(x, Tensor)]
    return [t for t in leaves if isinstance(t, Tensor)] + [t for x in inner for t in tensors_in(x, depth - 1)]


def _sources(model: nn.Module, args: Any, kwargs: Any) -> dict[int, tuple[str, Any]]:
    """Return where to find what is there before the step, by its storage."""
    found: dict[int, tuple[str, Any]] = {}
    for i, t in enumerate(pytree.tree_leaves((args, kwargs))):
        if isinstance(t, Tensor) and t.layout == torch.strided:
            found[_torch.storage_key(t)] = "argument", i
    for path, module in model.named_modules():
        tables = (("parameter", _torch.parameters(module)), ("buffer", _torch.buffers(module)))
        for kind, table in tables:
            for name, t in table.items():
                if t is not None and t.layout == torch.strided:
                    found.setdefault(_torch.storage_key(t), (kind, (path, name)))
                    if t.grad is not None:
                        found.setdefault(_torch.storage_key(t.grad), ("gradient", None))
    return found
