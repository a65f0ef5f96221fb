"""Budgets under DDP and FSDP2, on gloo, in two processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fit_distributed import CASES, SHARE, work
from processes import run_in_processes
from torch import distributed


pytestmark = [
    pytest.mark.skipif(not distributed.is_available(), reason="torch is built without torch.distributed"),
    pytest.mark.xdist_group("distributed"),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process found."""
    folder = tmp_path_factory.mktemp("budgets")
    run_in_processes(work, 2, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_training_is_the_plain_one(results: list[dict[str, Any]], name: str) -> None:
    """Losses, gradients and weights, and the plain peak; what FSDP2 gathers is beyond the budget, as parameters are."""
    for found in results:
        assert isinstance(found[name], dict), found[name]
        for same, peak, plain, dropped in found[name].values():
            is_sharded = name.startswith("FSDP2")
            assert same and dropped
            assert peak <= SHARE + 0.1 * is_sharded
            assert is_sharded or plain == pytest.approx(1, rel=1e-3)
