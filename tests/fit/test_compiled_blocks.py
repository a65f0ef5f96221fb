"""`convert(memory=..., compile=True)`: the blocks of a model are compiled in the converted one alone.

By eager kernels, as it is of no matter here which ones run: inductor's are in `test_compiled_budgets`.
"""

from __future__ import annotations

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from compiled import QUIET
from compiled_budgets import check, compiled_as, fresh as fresh, parts_again
from fit_models import Residual, branch, equal, fit_of, make, planned, quick_search as quick_search, square, state
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager

import revfx
from revfx import _torch
from revfx.errors import BudgetError


pytestmark = [QUIET, pytest.mark.usefixtures("by_eager_kernels")]


@pytest.fixture
def by_eager_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """`compile=True` compiles no C++."""
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", aot_eager)


def test_attention_is_compiled_and_runs_again() -> None:
    """In half precision; inductor compiles it for most of a minute."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 256, 0.1, batch_first=True, norm_first=True)
    model, x = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False), torch.randn(4, 64, 64)
    fitted: Any = revfx.convert(model, memory=0.6, compile=True)
    check(model, fitted, x, 0.6, True)
    assert not fitted.revfx.refusals


def test_what_parts_run_again_from_goes_as_the_backward_passes_them() -> None:
    """Of many layers what they run again from takes as much as one layer within."""
    torch.manual_seed(0)
    model, x = Residual(*(branch(64) for _ in range(24))), torch.randn(1024, 64)
    fitted: Any = planned(model, x, memory=0.17, compile=True)
    check(model, fitted, x, 0.17)


def test_copies_and_pickles_run_uncompiled_as_those_of_torch() -> None:
    model, (x,), _ = make("mlp")
    fitted: Any = planned(model, x, memory=0.5, compile=True)
    for twin in (copy.deepcopy(fitted), pickle.loads(pickle.dumps(fitted))):
        plain = copy.deepcopy(model)
        assert equal(state(twin, lambda m=twin: square(m(x))), state(plain, lambda m=plain: square(m(x))))


def test_evaluation_and_several_forwards_in_between() -> None:
    model, (x,), _ = make("mlp")
    fitted = planned(model, x, memory=0.5, compile=True)
    found: list[list[Tensor]] = []
    for m in (model, fitted):
        model.zero_grad()
        torch.manual_seed(1)
        with compiled_as(fitted):
            losses = [square(m(x)), square(m(x + 1))]
            with torch.no_grad():
                value = m(x)
        for loss in losses:
            loss.backward()
        found.append([value, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert equal(*found)


def test_the_least_names_the_part() -> None:
    model, (x,), _ = make("mlp")
    with pytest.raises(BudgetError, match=r"(?s)least feasible budget is \d+ bytes.*compiled Sequential"):
        planned(model, x, memory=0.05, compile=True)


def test_a_model_without_blocks_says_so() -> None:
    with pytest.raises(ValueError, match=r"this Linear has none.*part.compile"):
        revfx.convert(nn.Linear(4, 4), memory=0.5, compile=True)


def test_what_the_compiler_can_not_take_runs_as_it_is_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no compiler on this machine")

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", failing)
    model, (x,), _ = make("mlp")
    plain = copy.deepcopy(model)
    fitted: Any = planned(model, x, memory=0.5, compile=True)
    assert equal(state(fitted, lambda: square(fitted(x))), state(plain, lambda: square(plain(x))))
    assert ["layers.3" in str(r) for r in fitted.revfx.refusals].count(True) == 1 and parts_again(fitted)


def test_alike_blocks_are_compiled_once() -> None:
    from torch._dynamo.utils import counters

    counters.clear()
    model = Residual(*(branch() for _ in range(12)))
    x = torch.randn(64, 64)
    fitted = planned(model, x, memory=0.5, compile=True)
    square(fitted(x)).backward()
    assert counters["stats"]["unique_graphs"] == 2  # the input of the first needs no gradient


def test_the_plain_model_stays_uncompiled() -> None:
    """It shares its modules with the converted one, which runs compiled."""
    from torch._dynamo.utils import counters

    def frames() -> int:
        return counters["frames"]["total"]

    def joined(a: Tensor, b: Tensor) -> Tensor:
        """Between blocks of the converted model, another thread runs the plain one."""
        if armed and threading.current_thread() is threading.main_thread():
            armed.clear()
            before = frames()
            with ThreadPoolExecutor(1) as thread:
                is_plain = thread.submit(lambda: torch.equal(model.eval()(x), want)).result()
            found.append(is_plain and frames() == before)
            model.train()
        return a + b

    armed: list[bool] = []
    found: list[bool] = []
    torch.manual_seed(0)
    model, x = Residual(*(branch() for _ in range(6)), join=joined), torch.randn(256, 64)
    want = model.eval()(x)
    model.train()
    fitted: Any = revfx.convert(model, memory=0.5, compile=True)

    def are_clean() -> bool:
        return not any(_torch.is_compiled(m) or _torch.COMPILED in vars(m) for m in model.modules())

    assert are_clean()
    counters.clear()
    plain = state(model, lambda: square(model(x)))
    assert frames() == 0
    square(fitted(x)).backward()
    compiled = frames()
    assert compiled and are_clean()
    assert equal(state(model, lambda: square(model(x))), plain)
    assert frames() == compiled and fitted.state_dict().keys() == model.state_dict().keys()
    for _ in range(3):
        square(fitted(x)).backward()
    assert frames() == compiled and len(fit_of(fitted).plans) == 1 and parts_again(fitted)
    armed.append(True)
    square(fitted(x)).backward()
    assert found == [True] and are_clean()


def test_a_forward_that_raises_leaves_nothing_compiled() -> None:
    model, (x,), _ = make("mlp")
    fitted = revfx.convert(model, memory=0.5, compile=True)
    for _ in range(2):
        with pytest.raises(Exception, match="normalized_shape"):
            fitted(x[:, :63])
        assert not any(map(_torch.is_compiled, model.modules()))
