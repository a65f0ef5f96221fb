"""One forward, recorded on fake tensors: what it may leave behind is named, undone, or makes it untraceable."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any
from unittest import mock

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from revfx import _torch
from revfx.ambient import Ambience, all_generators, drew, restore
from revfx.capture.data import Capture, Spot
from revfx.capture.effects import Snapshot, left_alone, let_go, of_their_own
from revfx.capture.guards import GlobalReads, gives_anew, name_of, noting_reads
from revfx.capture.patches import intercepted
from revfx.capture.recorder import Recorder
from revfx.capture.transforms import declared_by_transforms
from revfx.capture.untraceable import GIVEN, LOST, Untraceable, untraceable
from revfx.capture.whole import called_whole
from revfx.eager.modes import recording
from revfx.errors import Reason


_lock = threading.Lock()


def capture(
    root: nn.Module,
    forward: Callable[..., Any],
    args: Any,
    kwargs: Any,
    opened: frozenset[str],
    carried: frozenset[Spot] = frozenset(),
    whole: frozenset[Callable[..., Any]] = frozenset(),
) -> Capture:
    """Return the recorded `forward(*args, **kwargs)` of `root`, with the numbers that are attributes at `carried` as
    inputs, and calls of `whole` functions as one operation each. Untraceable where the forward needs a value, leaves
    something behind, or uses tensors that are nowhere registered.
    """
    with _lock:
        recorder = Recorder(root, opened, carried)
        try:
            with called_whole(whole):
                found = _recorded(recorder, root, forward, args, kwargs)
        finally:
            fake, recorded = recorder.fake, frozenset(recorder.nodes)
            vars(recorder).clear()  # it holds what it recorded
            left = let_go(fake, recorded)
        if isinstance(found, Untraceable):
            raise found
        if left is not None:
            raise Untraceable(f"its forward leaves a tensor in {left}, {LOST}", kind=Reason.SIDE_EFFECT)
        return found


def _recorded(
    recorder: Recorder, root: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any
) -> Capture | Untraceable:
    modules, given = [*root.named_modules()], pytree.tree_leaves((args, kwargs))
    watched = {"", *recorder.opened}
    before, drawn = Snapshot([m for _, m in modules]), all_generators()
    read = GlobalReads([forward, *(type(m).forward for path, m in modules if path in watched)])
    try:
        if any(map(gives_anew, given)):
            text = "it is given an iterator, which gives something else every time"
            raise Untraceable(text, kind=Reason.HIDDEN_STATE)
        # an interrupt may come where the forward leaves a `with` of its own: the recorder looks on there too
        # autocast's cache would hold casts of fake parameters, which nothing can take out of it
        noting, ambient = noting_reads(recorder.numbers.of), recorder.ambient.entered(cached=False)
        told = mock.patch.object(recording, "recorder", recorder)
        with intercepted(), declared_by_transforms(), ambient, noting as reads, told, recorder.fake, recorder:
            fake_args, fake_kwargs = recorder.fake_inputs((args, kwargs))
            spoilt = Untraceable(f"its forward {GIVEN}", kind=Reason.SIDE_EFFECT)
            with left_alone((fake_args, fake_kwargs), spoilt):
                result = forward(*fake_args, **fake_kwargs)
        for i, name in before.changes():
            (path, module), value = modules[i], getattr(modules[i][1], name, None)
            what = f"its forward sets `{name_of(module)}.{name}`"
            if not isinstance(value, Tensor) or isinstance(value, nn.Parameter):
                raise Untraceable(f"{what}, {LOST}", path=path, once=True, kind=Reason.SIDE_EFFECT)
            if path not in watched:
                raise Untraceable(f"{what} of a module that it calls whole", opens=path, kind=Reason.SIDE_EFFECT)
            recorder.sets[path, name] = value
        if (name := read.changed()) is not None:
            raise Untraceable(f"its forward changes {name}, {LOST}", kind=Reason.SIDE_EFFECT)
        if (name := drew(drawn, all_generators())) is not None:
            text = f"its forward draws from {name} or seeds it, {LOST}"
            raise Untraceable(text, kind=Reason.HIDDEN_STATE)
        if Ambience.now() != recorder.ambient:
            text = f"its forward changes how kernels compute and leaves it so, {LOST}"
            raise Untraceable(text, kind=Reason.SIDE_EFFECT)
        with _torch.no_torch_function():
            return recorder.finish(result, reads)
    except MemoryError:  # says nothing of the forward
        raise
    except Exception as e:
        return untraceable(e, recorder.stack[-1])  # not raised from `e`, whose frames hold fake tensors
    finally:
        _torch.set_kernels(_torch.kernel_settings(), recorder.ambient.settings)
        before.restore()
        read.put_back()
        restore(drawn)
        of_their_own(recorder.graph, recorder.fake)
