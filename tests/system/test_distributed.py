"""torch.distributed on gloo, in one, two and four processes, against a plain model in a single process."""

from __future__ import annotations

import pytest
import torch
from distributed_cases import (
    BLOCKS,
    DDP,
    FSDP,
    IN_FOUR,
    IN_ONE,
    LAST,
    MEMORY,
    MIXED,
    OF_DDP,
    OF_MEMORY,
    OWN,
    SAME_KEYS,
    Key,
    work,
)
from distributed_models import Gradients, Result, Task, blocks, chain_of, reference
from distributed_parallel import PIPELINES, TENSOR, pipeline_reference, stages_of
from distributed_state import STATE
from helpers import DEEP, TOLERANCE, relative_error
from processes import run_in_processes
from torch import distributed
from ways import Plain


pytestmark = [
    pytest.mark.skipif(not distributed.is_available(), reason="torch is built without torch.distributed"),
    pytest.mark.usefixtures("fp64"),
    pytest.mark.xdist_group("distributed"),
]
WORLDS = (1, 2, 4) if DEEP else (1, 2)
in_four_processes = pytest.mark.deep  # they take turns on a machine with two cores
Results = dict[int, list[dict[Key, Result]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Per number of processes what each process gave."""
    found: Results = {}
    for world in WORLDS:
        folder = tmp_path_factory.mktemp(f"processes_{world}")
        run_in_processes(work, world, folder)
        found[world] = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]
    return found


def taken(results: Results, world: int, key: Key) -> list[Result]:
    """The results of each process for a case: revfx dropped saved tensors, if it was there, and no collective waits."""
    found = [by_rank[key] for by_rank in results[world]]
    for result in found:
        assert not result.error, result.error
        assert bool(result.dropped) == (key[2] not in ("plain", "checkpoint") or key[0] == "converted last")
        assert result.unwaited == 0
    return found


def assert_close(got: list[Gradients], expected: list[Gradients], tolerance: float = TOLERANCE) -> None:
    assert max(relative_error(g, e) for g, e in zip(got, expected, strict=True)) <= tolerance


def assert_same(got: Result, want: Result) -> None:
    """The gradients of plain's own processes and the buffers, bit for bit."""
    for g, w in zip([*got.gradients, got.buffers], [*want.gradients, want.buffers], strict=True):
        assert all(a is b if a is None or b is None else torch.equal(a, b) for a, b in zip(g, w, strict=True))


def check(results: Results, world: int, key: Key, task: Task, plain: Key | None = None) -> None:
    """Gradients are those of one process, and buffers those of the plain model in the same processes."""
    kind, case, way = key
    expected = reference(world, task)
    for rank, result in enumerate(taken(results, world, key)):
        assert_close(result.gradients, expected[: task.steps(rank)])
        theirs = results[world][rank][plain or (kind, case, "plain")]
        same = relative_error(result.buffers, theirs.buffers) < TOLERANCE
        assert same == (way != "checkpoint")  # it updates batch norm twice
        if world < 3 and way != "checkpoint" and plain is None:  # more processes add up in the order of their buckets
            assert_same(result, theirs)


# --- DDP
@pytest.mark.parametrize("way", OF_DDP)
@pytest.mark.parametrize(("world", "case"), [*((1, case) for case in IN_ONE), *((2, case) for case in DDP)])
def test_ddp_gives_the_average_of_the_plain_gradients(results: Results, world: int, case: str, way: str) -> None:
    check(results, world, ("DDP", case, way), DDP[case][1])


@in_four_processes
@pytest.mark.parametrize("way", OWN)
@pytest.mark.parametrize("case", IN_FOUR["DDP"])
def test_ddp_in_four_processes(results: Results, case: str, way: str) -> None:
    check(results, 4, ("DDP", case, way), DDP[case][1])


# --- FSDP2
@pytest.mark.parametrize("way", OWN)
@pytest.mark.parametrize("case", FSDP)
def test_fsdp2_gives_the_average_of_the_plain_gradients(results: Results, case: str, way: str) -> None:
    check(results, 2, ("FSDP", case, way), FSDP[case][1])


@in_four_processes
@pytest.mark.parametrize("way", OWN)
@pytest.mark.parametrize("case", IN_FOUR["FSDP"])
def test_fsdp2_in_four_processes(results: Results, case: str, way: str) -> None:
    check(results, 4, ("FSDP", case, way), FSDP[case][1])


@pytest.mark.parametrize("way", OWN)
@pytest.mark.parametrize("case", BLOCKS)
def test_converted_blocks_may_be_sharded_each(results: Results, case: str, way: str) -> None:
    expected, plain = reference(2, model=blocks(Plain)), taken(results, 2, ("blocks", case, "plain"))
    for result, same in zip(taken(results, 2, ("blocks", case, way)), plain, strict=True):
        assert_close(result.gradients, expected)
        assert_same(result, same)
        assert result.dropped >= 3 * (len(expected) - 1), "but for the first step, which learns"


@pytest.mark.parametrize("case", LAST)
def test_a_sharded_model_may_be_converted(results: Results, case: str) -> None:
    check(results, 2, ("converted last", case, "plain"), Task(accumulate=True), plain=("FSDP", "accumulation", "plain"))


def test_a_model_may_be_converted_around_blocks_that_are_sharded_each(results: Results) -> None:
    expected, plain = reference(2, model=blocks(Plain)), taken(results, 2, ("around", "around", "plain"))
    for result, same in zip(taken(results, 2, ("around", "around", "convert")), plain, strict=True):
        assert_close(result.gradients, expected)
        assert_same(result, same)


@pytest.mark.parametrize("way", OWN)
@pytest.mark.parametrize("case", MIXED)
def test_fsdp2_in_mixed_precision_computes_as_without_revfx(results: Results, case: str, way: str) -> None:
    expected = reference(2, model=chain_of(Plain))
    plain = taken(results, 2, ("mixed", case, "plain"))
    for result, same in zip(taken(results, 2, ("mixed", case, way)), plain, strict=True):
        assert_close(result.gradients, expected, 1e-5)
        assert_same(result, same)
        assert 1e-9 < relative_error(same.gradients[0], expected[0])  # it was in float32


def test_processes_may_have_codes_of_different_sizes(results: Results) -> None:
    """They don't disturb FSDP2's collectives."""
    key = ("guarded", "guarded", "convert")
    found, plain = taken(results, 2, key), taken(results, 2, (*key[:2], "plain"))
    for result, same in zip(found, plain, strict=True):
        assert_close(result.gradients, same.gradients, 0.0)


# --- tensor parallel
@pytest.mark.parametrize("way", OWN)
@pytest.mark.parametrize("case", TENSOR)
def test_tensor_parallel_functions_give_the_plain_gradients(results: Results, case: str, way: str) -> None:
    expected, plain = reference(1, model=chain_of(Plain)), taken(results, 2, ("tensor", case, "plain"))
    for result, same in zip(taken(results, 2, ("tensor", case, way)), plain, strict=True):
        assert_close(result.gradients, expected)
        assert_same(result, same)


@in_four_processes
@pytest.mark.parametrize("way", OWN)
def test_tensor_parallel_functions_may_be_sharded_too(results: Results, way: str) -> None:
    expected = reference(2, model=chain_of(Plain))
    for result in taken(results, 4, ("tensor and data", "tensor and data", way)):
        assert_close(result.gradients, expected)


def test_processes_agree_on_the_collectives_that_run_again(results: Results) -> None:
    key = ("disagreeing", "disagreeing")
    for by_rank in results[2]:
        result, plain = by_rank[(*key, "convert")], by_rank[(*key, "plain")]
        assert not result.error, result.error
        assert result.dropped == 0
        assert_same(result, plain)


# --- pipelines
@pytest.mark.parametrize("way", OWN)
@pytest.mark.parametrize(
    ("world", "case"),
    [
        *((2, case) for case in PIPELINES),
        *(pytest.param(4, case, marks=in_four_processes) for case in IN_FOUR["pipeline"]),
    ],
)
def test_stages_of_a_pipeline_give_the_plain_gradients(results: Results, world: int, case: str, way: str) -> None:
    stages = [stages_of(case, rank, world) for rank in range(world)]
    expected = pipeline_reference(sum(map(len, stages)))
    plain = taken(results, world, ("pipeline", case, "plain"))
    for mine, result, same in zip(stages, taken(results, world, ("pipeline", case, way)), plain, strict=True):
        assert_close(result.gradients, [[g for stage in mine for g in step[stage]] for step in expected])
        assert_same(result, same)


# --- checkpoints
@pytest.mark.parametrize("way", SAME_KEYS)
@pytest.mark.parametrize("case", STATE)
def test_checkpoints_move_between_plain_and_converted_models(results: Results, case: str, way: str) -> None:
    for rank, result in enumerate(taken(results, 2, ("state", case, way))):
        plain = results[2][rank]["state", case, "plain"]
        assert_close(result.gradients[0::2], result.gradients[1::2])  # the first model's, and the second's
        assert_same(result, plain)


# --- memory
@pytest.mark.parametrize("way", OF_MEMORY)
@pytest.mark.parametrize("case", MEMORY)
def test_activations_are_not_kept(results: Results, case: str, way: str) -> None:
    """Of eight layers; what FSDP2 gathers and what collectives write to is the same with and without revfx."""
    for rank, result in enumerate(taken(results, 2, ("memory", case, way))):
        plain = results[2][rank]["memory", case, "plain"].memory
        assert plain is not None and result.memory is not None
        assert result.memory.kept < 0.25 * plain.kept
        assert result.memory.peak < 0.7 * plain.peak
