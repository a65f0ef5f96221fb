"""DDP, FSDP2 and collectives with `torch.compile(backend="revfx")` on gloo, against a plain model in one process."""

from __future__ import annotations

import pytest
import torch
from compiled import INNERS
from compiled_distributed_cases import STOCK, Result, inners, reference, work
from compiled_distributed_models import DEPTH, reference_of
from compiled_distributed_placing import BUCKETS, CASES, COLLECTIVES, DDP, FSDP, ORDERS, TENSOR, Case
from helpers import relative_error
from processes import run_in_processes
from torch import Tensor, distributed


pytestmark = [
    pytest.mark.skipif(not distributed.is_available(), reason="torch is built without torch.distributed"),
    pytest.mark.usefixtures("fp64"),
    pytest.mark.xdist_group("distributed"),
]
Results = dict[tuple[str, str, str], Result]
WORLD = 2


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    """What each process gave."""
    folder = tmp_path_factory.mktemp("processes")
    run_in_processes(work, WORLD, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


def grid(kind: str) -> list[tuple[str, str]]:
    """(case, way) of every run of a kind by revfx."""
    return [(case, way) for case in CASES[kind] for way in inners(case)]


def check(
    found: list[Results], key: tuple[str, str, str], case: Case, expected: list[list[list[Tensor | None]]]
) -> None:
    """The gradients are those of one process, `expected` by rank, and all graphs were reported and logged."""
    for by_rank, gradients in zip(found, expected, strict=True):
        result = by_rank[key]
        assert not result.error, result.error
        for got, right in zip(result.gradients, gradients, strict=True):
            assert relative_error(got, right) < case.tolerance
        assert result.regions == list(case.regions)
        assert len(result.log) == len(case.regions)
        assert ["reversible: nothing" in line for line in result.log] == [not n for n in case.regions]


# --- DDP
@pytest.mark.parametrize(("name", "way"), grid("DDP"))
def test_ddp_gives_the_average_of_the_plain_gradients(results: list[Results], name: str, way: str) -> None:
    case = DDP[name]
    check(results, ("DDP", name, way), case, [reference(WORLD, case)] * WORLD)


@pytest.mark.parametrize("way", INNERS)
@pytest.mark.parametrize("order", ORDERS)
def test_what_the_buckets_split_off_is_lost(results: list[Results], order: str, way: str) -> None:
    """DDP's optimizer cuts a graph at the buckets: regions end there, and a graph of one coupling has none."""
    inverted = [results[0]["DDP", f"{order}, {buckets}", way].inverted for buckets in BUCKETS]
    left = {"default buckets": 2 * DEPTH, "four functions a bucket": 2 * DEPTH, "one function a bucket": 0}
    assert inverted == [left[buckets] for buckets in BUCKETS]
    assert results[0]["DDP", f"{order}, small buckets, not split", way].inverted == inverted[0]


# --- FSDP2
@pytest.mark.parametrize(("name", "way"), grid("FSDP"))
def test_fsdp2_gives_the_average_of_the_plain_gradients(results: list[Results], name: str, way: str) -> None:
    case = FSDP[name]
    check(results, ("FSDP", name, way), case, [reference(WORLD, case)] * WORLD)


@pytest.mark.parametrize("name", FSDP)
def test_stock_torch_compiles_as_many_graphs_of_a_sharded_model(results: list[Results], name: str) -> None:
    """FSDP2's hooks run outside of any graph, so a region ends where a sharded module does, under any backend."""
    stock = results[0]["FSDP", name, STOCK]
    assert not stock.error, stock.error
    assert stock.graphs == len(FSDP[name].regions)


# --- collectives
@pytest.mark.parametrize(("name", "way"), grid("collectives"))
def test_collectives_in_a_graph_run_once_and_give_the_plain_gradients(
    results: list[Results], name: str, way: str
) -> None:
    key, case = ("collectives", name, way), COLLECTIVES[name]
    check(results, key, case, [reference_of(WORLD, rank, case.build) for rank in range(WORLD)])
    # as often as by torch alone: each once forwards and once backwards, where it sums gradients
    counted = {by_rank["collectives", name, w].collectives for by_rank in results for w in (way, STOCK)}
    assert counted == {2 if name == "between chains" else 4}
    assert all("all_reduce" in line for line in results[0][key].log)


# --- tensor parallel
@pytest.mark.parametrize(("name", "way"), grid("tensor"))
def test_functions_cut_among_the_processes_give_the_plain_gradients(
    results: list[Results], name: str, way: str
) -> None:
    """Nothing is computed back, as in couplings with other collectives."""
    case = TENSOR[name]
    check(results, ("tensor", name, way), case, [reference(WORLD, case)] * WORLD)
