"""DDP and FSDP2 on gloo, in one and two processes, against a plain model in a single process."""

from __future__ import annotations

import pytest
import torch
from distributed_cases import DDP, FSDP, Result, reference, work
from helpers import TOLERANCE, relative_error
from torch import distributed
from torch.multiprocessing.spawn import spawn
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
        spawn(work, (world, str(folder)), nprocs=world)
        found[world] = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]
    return found


def check(found: list[Results], key: tuple[str, str, str], unused: bool, accumulate: bool) -> None:
    """Gradients are those of one process, and buffers those of the plain model in the same processes."""
    kind, case, way = key
    expected = reference(len(found), unused, accumulate)
    for by_rank in found:
        result, plain = by_rank[key], by_rank[kind, case if case in (*DDP, *FSDP) else "whole", "plain"]
        assert not result.error, result.error
        assert max(relative_error(g, e) for g, e in zip(result.gradients, expected, strict=True)) < TOLERANCE
        same = relative_error(result.buffers, plain.buffers) < TOLERANCE
        assert same == bool(result.regions) == (way != "checkpoint")  # it updates batch norm twice


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
def test_fsdp2_gives_the_average_of_the_plain_gradients(results: dict[int, list[Results]], case: str, way: str) -> None:
    check(results[2], ("FSDP", case, way), unused=False, accumulate=False)


def test_a_sharded_model_may_be_converted(results: dict[int, list[Results]]) -> None:
    check(results[2], ("FSDP", "converted last", "convert"), unused=False, accumulate=False)
