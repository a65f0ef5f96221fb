"""The first forward of an unknown way: block by block, like the first forward of a kind."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from revfx import _torch
from revfx.engine.native import NativeWatching, learner
from revfx.engine.watch import Watching
from revfx.plan.blocks import BlockLearning, block_paths
from revfx.plan.model import tensors_in


class UnknownWay:
    """Drop saved tensors block by block once a watched forward has left all recorded ways.

    Recorded blocks match units, which are cheaper. So this begins when a block has passed in which no unit matched;
    with the call of the next one, as a dispatch mode can't be turned on while an operator runs.

    Args:
        model: the model, in whose lists of modules the blocks are.
        given: the arguments of the forward.
        watching: the watcher, which goes on to protect the tensors of earlier units.
    """

    def __init__(self, model: nn.Module, given: Any, watching: Watching | NativeWatching) -> None:
        self._model, self._given, self._watching = model, given, watching
        self._thread = threading.get_ident()
        self._hook: Any = None
        self._blocks = frozenset[int]()  # ids of their modules
        self._matched: int | None = None  # units, when the last block began
        self._learning: BlockLearning | None = None

    def __enter__(self) -> None:
        self._watching.forward.leaving = self._wait

    def __exit__(self, *error: Any) -> None:
        self._watching.forward.leaving = None  # it holds this object
        self._stop_waiting()
        if self._learning is not None:
            self._learning.__exit__(*error)

    def _wait(self) -> None:
        if self._hook is None and self._learning is None:
            paths = {*block_paths(self._model).values()}
            self._blocks = frozenset([id(module) for path, module in self._model.named_modules() if path in paths])
            self._hook = register_module_forward_pre_hook(self._begin)

    def _stop_waiting(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    @_torch.never_compiled
    def _begin(self, module: nn.Module, _: Any) -> None:
        if torch.compiler.is_compiling():  # compiled parts run without it
            return
        if threading.get_ident() != self._thread or self._hook is None or id(module) not in self._blocks:
            return
        before, self._matched = self._matched, self._watching.forward.count
        if before != self._matched or not self._watching.is_innermost():  # contexts close from the inside out
            return
        self._stop_waiting()
        self._watching.stop()
        self._learning = learner(BlockLearning)(self._model, tensors_in(self._given))
        self._learning.__enter__()
