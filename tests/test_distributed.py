"""DDP and FSDP2 on gloo, in one and two processes, against a plain model in a single process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from distributed_cases import DDP, FSDP, Result, reference, work
from helpers import TOLERANCE, relative_error
from torch import distributed
from ways import WAYS


pytestmark = [
    pytest.mark.skipif(not distributed.is_available(), reason="torch is built without torch.distributed"),
    pytest.mark.usefixtures("fp64"),
    pytest.mark.xdist_group("distributed"),
]
Results = dict[tuple[str, str, str], Result]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Results]]:
    """Per number of processes what each process gave; they start once, as importing torch takes seconds."""
    found: dict[int, list[Results]] = {}
    for world in (1, 2):
        folder = tmp_path_factory.mktemp(f"processes_{world}")
        torch.multiprocessing.spawn(work, (world, str(folder)), nprocs=world)
        found[world] = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]
    return found


def check(found: list[Results], key: tuple[str, str, str], unused: bool, accumulate: bool) -> None:
    expected = reference(len(found), unused, accumulate)
    for by_rank in found:
        result = by_rank[key]
        assert not result.error, result.error
        assert max(relative_error(g, e) for g, e in zip(result.gradients, expected, strict=True)) < TOLERANCE
        assert bool(result.regions) == (key[2] != "checkpoint")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", DDP)
@pytest.mark.parametrize("world", [1, 2])
def test_ddp_gives_the_average_of_the_plain_gradients(
    results: dict[int, list[Results]], world: int, case: str, way: str
) -> None:
    _, unused, accumulate = DDP[case]
    check(results[world], ("DDP", case, way), unused, accumulate)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", FSDP)
def test_fsdp2_gives_the_average_of_the_plain_gradients(
    results: dict[int, list[Results]], case: str, way: str
) -> None:
    check(results[2], ("FSDP", case, way), unused=False, accumulate=False)
