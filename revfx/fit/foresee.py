"""Planners without a training: a step is recorded on fake tensors, or on copies if code asks for numbers."""

from __future__ import annotations

import contextlib
import logging
import traceback
from typing import Any

import torch
from torch import nn

from revfx import _fake, _torch
from revfx.ambient import set_variable
from revfx.engine.native import learner
from revfx.errors import RevfxError
from revfx.fit.costs import Costs, estimate_costs
from revfx.fit.grouping import RecordedStep
from revfx.fit.inverted import InvertedSteps
from revfx.fit.learning import StepLearning
from revfx.fit.needs import Needs
from revfx.fit.planner import Planner
from revfx.fit.step_recorder import StepRecorder
from revfx.fit.survey import Survey
from revfx.modes import allow_fakes
from revfx.parts import part_observer, parts_of
from revfx.passes.sizes import mute_logger
from revfx.plan.declared import CallObserver
from revfx.plan.model import run_plainly_inside, tensors_in
from revfx.world.fake import CopiedWorld, FakeWorld
from revfx.world.left import purge_fakes_after


LOG = logging.getLogger("revfx")


def foreseen_survey(model: nn.Module, args: Any, kwargs: Any) -> Survey:
    """Return the planners of a step of a plain model.

    Raises:
        RevfxError: the model is compiled as a whole, or nothing that it returns needs a gradient.
        Exception: the model's own.
    """
    recorded = foreseen_step(model, args, kwargs)
    costs = Costs().of(recorded.step)
    if not any(cost.seconds for cost in costs):  # on the "meta" device nothing takes time
        costs = estimate_costs(recorded.step, costs)
    planner = Planner(Needs(recorded.step, recorded.unfilled()), costs, any_caller=True)
    return Survey(planner, InvertedSteps(planner, recorded))


def foreseen_step(model: nn.Module, args: Any, kwargs: Any) -> RecordedStep:
    """Return a step of a plain model; see `foreseen_survey`."""
    if _torch.is_compiled(model):
        text = "it is compiled as a whole, and no part of that can run again:"
        raise RevfxError(f"{text} compile its blocks instead (`block.compile()`), or see `compile=True`.")
    if not parts_of(model):
        try:
            return _record(FakeWorld(model, args, kwargs, whole=True))
        except RevfxError:
            raise
        except Exception:  # it asks for numbers, or no fake tensors pass
            LOG.info("a step on fake tensors failed: it runs on copies")
    return _record(CopiedWorld(model, args, kwargs))


def _record(world: FakeWorld) -> RecordedStep:
    is_real = isinstance(world, CopiedWorld)
    with contextlib.ExitStack() as stack:
        contexts = (
            purge_fakes_after(world.mode),
            mute_logger(_fake.FAKE_LOGGER),
            _torch.pause_collector(),
            torch.enable_grad(),
        )
        for context in (*contexts, torch.random.fork_rng(enabled=is_real)):
            stack.enter_context(context)
        if not is_real:
            stack.enter_context(allow_fakes())
        stack.callback(world.fakes.clear)
        try:
            return _step(world, *stack.enter_context(world.entered()))
        except Exception as e:
            if not is_real:  # its frames hold fake tensors, and so do their tables of names; real ones are tried next
                traceback.clear_frames(e.__traceback__)
                _ = [frame.f_locals for frame, _ in traceback.walk_tb(e.__traceback__)]  # are made anew
            raise


def _step(world: FakeWorld, args: Any, kwargs: Any) -> RecordedStep:
    model, inputs, finished = world.model, tensors_in((args, kwargs)), list[StepRecorder]()
    in_python = bool(parts_of(model)) or not isinstance(world, CopiedWorld)
    learning = learner(StepLearning, in_python)(model, inputs, finished.append)
    with learning, CallObserver(learning), run_plainly_inside(), set_variable(part_observer, learning):
        out = model(*args, **kwargs)
    outs = [t for t in tensors_in(out) if t.requires_grad]
    outs = [t for t in outs if not t.dim()] or outs  # where there is a loss, it is what is differentiated
    if not outs:
        raise RevfxError("the forward returns no tensor that needs a gradient, as far as can be seen.")
    recorded = learning.end(inputs, tensors_in(out))
    constants = recorded.tape.constants
    for value, t in [*constants.items()]:
        real = world.real_of(t) if _torch.is_fake(t) else t
        if real is None:
            del constants[value]
        else:
            constants[value] = real
    del out
    torch.autograd.backward(outs, [torch.ones_like(t) for t in outs])
    if not finished:
        raise RevfxError("the backward leaves a part of the graph for another one.")
    return recorded
