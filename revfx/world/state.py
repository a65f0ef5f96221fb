"""What a call of f depends on besides its arguments: noted before it runs, put back around its re-run, and checked.

The contract is that of `torch.utils.checkpoint`, and more than it restores. Put back are the random state, the buffers
that f writes, `training` and the plain attributes of the modules that f reaches, lists and dicts in them one level
deep. Parameters, other buffers and tensors that f closes over must be at the backward what they were in the forward:
versions, addresses and identities are compared. All else that f reads must be constant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from revfx import _fsdp, _torch
from revfx.errors import RegenerationError
from revfx.world.reach import ATOMS, CONTAINERS, EMPTY, LONG, Reach, Written, held_in, is_users, layout_of


# --- random state
class Random:
    """The state of the CPU's generator, and of those of the accelerators that a region computes on."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self.cpu = torch.get_rng_state().view(torch.int64)  # which compares faster than bytes
        self.others = [(d, torch.get_device_module(d).get_rng_state(d)) for d in devices]

    def restore(self) -> None:
        """Make the generators go on from this state."""
        torch.set_rng_state(self.cpu.view(torch.uint8))
        for device, state in self.others:
            torch.get_device_module(device).set_rng_state(state, device)

    def same(self, other: Random) -> bool:
        """Return whether nothing was drawn between the two."""
        return torch.equal(self.cpu, other.cpu) and all(
            torch.equal(mine, theirs) for (_, mine), (_, theirs) in zip(self.others, other.others, strict=True)
        )


# --- one call
# The table that holds a tensor (None: it is closed over) and its name there, the tensor, its version and address, and
# whether it needs a gradient.
Version = tuple[dict[str, Any] | None, str, Tensor, int, int | None, bool]


class CallState:
    """What one call depends on, noted as it begins; `random` is set where it drew.

    `attributes` are tables with names, values and sizes; `contents` containers, and `cells` variables, with what was in
    them; `buffers` those that the call may write: table, name, tensor, version and a copy; `versions` the tensors that
    must not change.
    """

    __slots__ = ("attributes", "buffers", "cells", "contents", "learns", "locks", "name", "random", "reach", "versions")

    def __init__(self, name: str, reach: Reach) -> None:
        self.name, self.reach = name, reach
        self.random: Random | None = None
        self.locks: list[Any] = []
        self.attributes: list[tuple[dict[str, Any], tuple[str, ...], tuple[Any, ...], int]] = []
        self.contents: list[tuple[Any, tuple[Any, ...]]] = []
        self.cells = [(c, held) for c in reach.cells if (held := held_in(c)) is not EMPTY]
        for module in reach.modules.values():
            self._note_attributes(module)
        self.buffers: list[tuple[dict[str, Any], str, Tensor, int, Tensor]] = []
        self.learns: list[tuple[Written, bool, int]] = []
        self.versions = [_version(None, "", t) for t in reach.tensors]
        for table in reach.parameters:
            self.versions += [_version(table, k, p) for k, p in table.items() if p is not None]
        for module, written in reach.buffers:
            self._note_buffers(module, written)

    def _note_attributes(self, module: nn.Module) -> None:
        table = vars(module)
        size, names, read = layout_of(module, table)
        values = read(table)
        if not ATOMS.issuperset(map(type, values)):
            held = [v for v in values if isinstance(v, CONTAINERS) and len(v) <= LONG]
            self.contents += [(c, _bare(content(c))) for c in held]
            values = _bare(values)
        self.attributes.append((table, names, values, size))

    def _note_buffers(self, module: nn.Module, written: Written) -> None:
        table, names = _torch.buffers(module), written.names.get(module.training)
        if names is None or names:
            written.lock.acquire()
            self.locks.append(written.lock)
        if names is None:
            self.learns.append((written, module.training, len(self.buffers)))
        for name, b in table.items():
            if b is not None and (names is None or name in names):
                self.buffers.append((table, name, b, _torch.version(b), b.detach().clone()))
            elif b is not None:
                self.versions.append(_version(table, name, b))

    def settle(self, returned: bool) -> None:
        """Let go of the locks, as the call has ended; where it was the first of its kind, and `returned`, learn which
        buffers it wrote, and let go of the copies of the others.
        """
        if returned and self.learns:
            wrote = [_wrote(*b[2:]) for b in self.buffers]
            ends = [*(at for _, _, at in self.learns[1:]), len(wrote)]
            for (written, training, start), stop in zip(self.learns, ends, strict=True):
                if any(wrote[start:stop]):  # statistics may come out as they were, as of zeros: no sign of what follows
                    wrote[start:stop] = [wrote[i] or self.buffers[i][2].dim() == 1 for i in range(start, stop)]
                mine = zip(self.buffers[start:stop], wrote[start:stop], strict=True)
                written.names[training] = frozenset(name for (_, name, *_), did in mine if did)
            self.versions += [_version(*b[:3]) for b, did in zip(self.buffers, wrote, strict=True) if not did]
            self.buffers = [b for b, did in zip(self.buffers, wrote, strict=True) if did]
        if returned and self.reach.buffers:  # what only later calls write, as after a warm-up
            late = [v for v in self.versions if _torch.version(v[2]) != v[3]]
            for module, written in self.reach.buffers if late else ():
                names = {name for table, name, *_ in late if table is _torch.buffers(module)}
                written.names[module.training] = written.names.get(module.training, frozenset[str]()) | names
        while self.locks:
            self.locks.pop().release()

    def put_back(self) -> Callable[[], None]:
        """Put all back as it was when the call began, if no tensor changed that must not; return what undoes that."""
        locks = [w.lock for _, w in self.reach.buffers] if self.buffers else []
        for lock in locks:
            lock.acquire()
        moves = _fsdp.in_use()  # it frees and gathers storages by design
        tables = [(t, t.copy()) for t, *_ in self.attributes]
        contents = [(c, content(c)) for c, _ in self.contents]
        cells = [(c, now) for c, then in self.cells if (now := held_in(c)) is not then]
        swapped: list[tuple[dict[str, Any], str, Any]] = []
        turned: list[tuple[Tensor, bool]] = []
        random = None if self.random is None else Random([d for d, _ in self.random.others])

        def undo() -> None:
            for table, name, t in reversed(swapped):
                table[name] = t
            for table, then in tables:
                for name in table.keys() - then.keys():
                    del table[name]
                table.update(then)
            for container, then in contents:
                fill(container, then)
            for cell, now in cells:
                if now is EMPTY:
                    del cell.cell_contents
                else:
                    cell.cell_contents = now
            for t, needs in turned:
                t.requires_grad_(not needs)
            if random is not None:
                random.restore()

        def undo_whatever_comes() -> None:
            try:
                undo()
            except BaseException:  # an interrupt: what is put back twice is as what is put back once
                undo()
                raise
            finally:
                while locks:
                    locks.pop().release()

        try:
            for table, name, t, version, address, needs in self.versions:
                if _torch.version(t) != version or (_torch.data_address(t) != address and not moves):
                    raise RegenerationError(self._changed(name))
                if t.requires_grad != needs:
                    turned.append((t, needs))
                    t.requires_grad_(needs)
                if table is not None and (now := table.get(name)) is not t:
                    swapped.append((table, name, now))
                    table[name] = t
            for table, names, values, size in self.attributes:
                if len(table) != size or not all(map(is_, map(table.get, names), values)):
                    for name in [n for n in table if n not in names and is_users(n)]:
                        del table[name]
                    table.update(zip(names, values, strict=True))
            for container, then in self.contents:
                fill(container, then)
            for cell, then in self.cells if cells else ():
                cell.cell_contents = then
            for table, name, _, _, copy in self.buffers:
                swapped.append((table, name, table.get(name)))
                table[name] = copy.clone()
            if self.random is not None:
                self.random.restore()
        except BaseException:
            undo_whatever_comes()
            raise
        return undo_whatever_comes

    def _changed(self, name: str) -> str:
        what = f"`{name}` of `{self.name}`" if name else f"a tensor that `{self.name}` closes over"
        return (
            f"{what} was modified in place (or its `.data` was replaced) between the forward and the backward, or by"
            f" `{self.name}` itself, so its activations can't be regenerated as they were. Run the backward before the"
            " update, keep what a forward writes in a buffer (`register_buffer`), or keep the activations with"
            " `revfx.testing.store_activations()`."
        )


def _bare(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return `values` with tensors without their history, which may lead to the state that would hold them."""
    return tuple([_detached(v) for v in values])


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor) and not value.is_leaf:
        return value.detach().requires_grad_()
    if type(value) is not tuple:
        return value
    made = _bare(value)
    return value if all(map(is_, made, value)) else made


def _version(table: dict[str, Any] | None, name: str, t: Tensor) -> Version:
    return table, name, t, _torch.version(t), _torch.data_address(t), t.requires_grad


def _wrote(buffer: Tensor, version: int, copy: Tensor) -> bool:
    """Return whether a call wrote to a buffer of which there is a copy; a normalisation's kernel does not count it."""
    silent = not _torch.is_fake(buffer) and not torch.equal(buffer.detach(), copy)
    return silent or _torch.version(buffer) != version


def content(container: Any) -> tuple[Any, ...]:
    """Return what a container holds; of a dict its pairs."""
    return tuple(container.items() if isinstance(container, dict) else container)


def holds(container: Any, then: tuple[Any, ...]) -> bool:
    """Return whether a container holds the objects that it held."""
    now = content(container)
    return len(now) == len(then) and all(map(_same, now, then))


def fill(container: Any, then: tuple[Any, ...]) -> None:
    """Make a container hold what it held."""
    if not holds(container, then):
        container.clear()
        (container.update if isinstance(container, (dict, set)) else container.extend)(then)


def _same(now: Any, then: Any) -> bool:
    pair = type(then) is tuple and type(now) is tuple and len(now) == len(then)  # of a dict
    return now is then or (pair and all(map(is_, now, then)))
