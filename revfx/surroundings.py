"""What a call depends on besides its arguments, taken before it runs and put back around the re-run.

Parameters, buffers and tensors that a function closes over are noted with their version and address, and compared
before the re-run: autograd's own check does not see them under saved-tensor hooks. Buffers that the call may write
are cloned, and the re-run works on the clones, so that it reads what the forward read and leaves what the forward
left; likewise attributes of modules, `training` among them, hooks, variables that a function closes over, globals and
attributes of classes that it names, and what containers and plain objects in all these hold. The random state is kept
only for calls that draw. What is noted is found by `reach`.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from revfx import _torch
from revfx.errors import RegenerationError
from revfx.reach import Held, Reads, frozen_written, reads_of


_swapping = threading.RLock()  # two threads that put the same module's buffers back must not overlap
PATIENCE = 300.0  # seconds
ALWAYS_KEPT = 4096  # elements; a clone of a buffer this small is kept without comparing


@contextlib.contextmanager
def _alone(name: str) -> Generator[None]:
    """A context in which no other thread calls a function with buffers.

    Raises:
        RegenerationError: one does so for so long that it may be waiting for this thread.
    """
    if not _swapping.acquire(timeout=PATIENCE):
        raise RegenerationError(
            f"`{name}` has waited {PATIENCE:g} seconds for another thread in which a function with buffers runs. If"
            " that waits for this one, as for a thread that it has started, neither would ever end: call the blocks"
            " inside of it in its own thread."
        )
    try:
        yield
    finally:
        _swapping.release()


@dataclass(slots=True)
class Random:
    """The state of the CPU's generator and, where given, of one accelerator's."""

    cpu: Tensor
    device: torch.device | None
    accelerator: Tensor | None

    @staticmethod
    def now(device: torch.device | None) -> Random:
        """The current state."""
        accelerator = torch.get_device_module(device).get_rng_state(device) if device is not None else None
        return Random(torch.get_rng_state(), device, accelerator)

    def restore(self) -> None:
        """None; the generators go on from this state."""
        torch.set_rng_state(self.cpu)
        if self.accelerator is not None:
            torch.get_device_module(self.device).set_rng_state(self.accelerator, self.device)

    def same(self, other: Random) -> bool:
        """Whether nothing was drawn between the two."""
        return torch.equal(self.cpu, other.cpu) and (
            self.accelerator is None or other.accelerator is None or torch.equal(self.accelerator, other.accelerator)
        )


@dataclass(slots=True)
class Surroundings:
    """What one call depended on: what it could read, and the random state where it drew."""

    name: str
    reads: Reads
    random: Random | None = None

    def settle(self) -> None:
        """None; called after the forward call: clones of large buffers that it did not write are let go."""
        self.reads.end()
        for h in self.reads.tensors:
            if h.clone is None:
                h.by_itself = _torch.version(h.tensor) != h.version
            if h.clone is None or (h.clone.numel() <= ALWAYS_KEPT and h.probed is None):
                continue
            silent = not _torch.is_fake(h.tensor) and not torch.equal(h.tensor.detach(), h.clone)  # batch norm, `.data`
            unwritten = _torch.version(h.tensor) == h.version and not silent
            if h.probed is not None:
                names = frozen_written.setdefault(h.probed, {}).setdefault(h.probed.training, set())
                names.update(() if unwritten else (h.key,))
                h.probed = None
            if unwritten:
                h.clone = None

    @contextlib.contextmanager
    def restored(self) -> Generator[None]:
        """A context in which the call can be run again as it ran; afterwards everything is as it was before.

        Raises:
            RegenerationError: a tensor that the call read was written, or its storage swapped, since.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(_alone(self.name))  # what another re-run has put back is not how things are
            differs = self.reads.differ()
            if not differs and self.random is None and not self.reads.cloned:
                stack.close()
            yield from self._restored(differs)

    def _restored(self, differs: bool) -> Iterator[None]:
        swapped: list[tuple[Any, Any, Any]] = []
        attributes = [(vars(m), dict(vars(m))) for m, *_ in self.reads.modules]
        before = self.reads.now(differs)
        random = Random.now(self.random.device) if self.random is not None else None
        turned = [h for h in self.reads.tensors if h.clone is None and h.tensor.requires_grad != h.needs_grad]
        for h in self.reads.tensors:
            if h.clone is None and h.changed():
                raise RegenerationError(_why(self.name, h))

        def put_all_back() -> None:
            for holder, key, value in reversed(swapped):
                holder[key] = value
            for holder, own in attributes:
                for key in holder.keys() - own.keys():
                    del holder[key]
                holder.update(own)
            before.put_back()
            for h in turned:
                h.tensor.requires_grad_(not h.needs_grad)
            if random is not None:
                random.restore()

        try:
            if differs:
                self.reads.put_back()
            for h in turned:
                h.tensor.requires_grad_(h.needs_grad)
            for h in self.reads.tensors:
                use = h.tensor if h.clone is None else h.clone.detach().clone().requires_grad_(h.clone.requires_grad)
                now = h.holder[h.key] if isinstance(h.holder, list) else h.holder and h.holder.get(h.key)
                if h.holder is not None and (h.clone is not None or now is not h.tensor):
                    swapped.append((h.holder, h.key, now))
                    h.holder[h.key] = use
            if self.random is not None:
                self.random.restore()
            yield
        except Exception as error:
            if differs and hasattr(error, "add_note"):  # from Python 3.11 on
                error.add_note(_NOTE.format(self.name))
            raise
        finally:
            try:
                put_all_back()
            except BaseException:  # an interrupt: what is put back twice is as what is put back once
                put_all_back()
                raise


_NOTE = (
    "revfx: raised when `{}` was run again for the backward, with all that it reads put back as it was before it ran"
    " first. What it sets up once (a registry, a library, a cache) should be there before: call it under"
    " `torch.no_grad()` once."
)


def _why(name: str, h: Held) -> str:
    what = f"`{h.key}` of `{name}`" if isinstance(h.key, str) and h.key else f"a tensor that `{name}` closes over"
    if h.by_itself:
        return (
            f"{what} is written in place by `{name}` itself, so its activations can't be regenerated as they were. Keep"
            " what a forward writes in a buffer (`register_buffer`), or the activations with"
            " `revfx.testing.store_activations()`."
        )
    return (
        f"{what} was modified in place (or its `.data` was replaced) between the forward and the backward, so the"
        f" activations of `{name}` can't be regenerated as they were. Run the backward before the update, or keep the"
        " activations with `revfx.testing.store_activations()`."
    )


@contextlib.contextmanager
def noted(name: str, function: Any) -> Generator[Surroundings]:
    """A context to call `function` in: what the call depends on.

    Where it may write to buffers, no re-run in another thread puts others in their place meanwhile.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_alone(name))
        reads = reads_of(function)
        if not reads.cloned:
            stack.close()
        surroundings = Surroundings(name, reads)
        reads.begin()
        yield surroundings
        surroundings.settle()
