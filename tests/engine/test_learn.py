"""Recording a forward."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import CodeType
from typing import Any

import pytest
import torch
from watching import ROWS, WIDTH, Coupling, Couplings

import revfx
from revfx.engine.learn import Learning
from revfx.engine.native import learner


@pytest.mark.parametrize("python", [pytest.param(True, id="python"), pytest.param(False, id="native")])
def test_a_profile_function_is_told_of_the_calls_of_the_model_alone(python: bool) -> None:
    calls: Counter[CodeType] = Counter()

    def profile(frame: Any, event: str, _: Any) -> None:
        if event == "call":
            calls[frame.f_code] += 1

    model, before = Couplings(depth=5), sys.getprofile()
    learning: Any = learner(Learning, python)(model)
    with learning:
        sys.setprofile(profile)
        try:
            model(torch.randn(ROWS, 2 * WIDTH))
            with pytest.raises(RuntimeError, match="size of tensor"):
                torch.ones(2).add(torch.ones(3))
            assert sys.getprofile() is profile
            Coupling()(torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH))
        finally:
            sys.setprofile(before)
    assert calls[Coupling.forward.__code__] == 6
    folder = str(Path(revfx.__file__).parent)
    ours = sum(count for code, count in calls.items() if code.co_filename.startswith(folder))
    assert ours < 4 * len(learning.tape.ops), calls  # entries for an operator and for saved tensors, nothing inside
