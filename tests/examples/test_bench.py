"""The bench: its models, its ways, and the table that it prints."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bench import run
from bench.chains import Coupling, Flow
from bench.count import CARDS, count
from bench.measure import Contender, Row, Sizes, measure
from bench.models import MODELS, TINY_MODELS, Task
from bench.ways import WAYS, Way
from torch import Tensor


CHAINS = ("mlp", "revnet", "transformer", "flow", "leapfrog")
LIBRARIES = {"revlib", "memcnn", "revtorch", "reformer"}
EAGER = [way for way in WAYS.values() if not way.compiles and not way.missing()]
BENCH = Path(run.__file__).parent


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def rows_of(
    model: str, ways: Sequence[Way], depth: int = 4, batch: int = 256, rounds: int = 1
) -> dict[tuple[str, Any], Row]:
    """Rows of the bench by way and setting."""
    rows = measure(MODELS[model], ways, rounds, Sizes(depth, batch), lambda text: None)
    return {(row.way, row.setting): row for row in rows}


def peak_of(rows: dict[tuple[str, Any], Row], way: str, setting: Any = None) -> int:
    peak = rows[way, setting].peak
    assert peak is not None
    return peak


def run_bench(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr."""
    try:
        status = run.main(argv)
    except SystemExit as e:  # argparse
        status = int(e.code or 0)
    out, err = capsys.readouterr()
    return status, out, err


# --- the table of all eager ways
@pytest.mark.filterwarnings("ignore")  # the libraries use deprecated parts of torch
@pytest.mark.parametrize("model", ["mlp", "revnet", "flow"])
def test_bits_and_peaks_of_all_eager_ways(model: str) -> None:
    ways = EAGER
    if model != "mlp":  # plans take longest
        ways = [replace(way, settings=(80,)) if way.name == "memory" else way for way in EAGER]
    rows = rows_of(model, ways, batch=8 if model == "revnet" else 256)
    assert [*rows] == [(way.name, setting) for way in ways for setting in way.settings]
    plain = rows["plain", None]
    assert plain.is_bitwise and plain.share == 1.0 and plain.ratio == (1.0, 1.0, 1.0) and plain.kept and plain.peak
    assert plain.kept < plain.peak

    for (name, setting), row in rows.items():
        is_refused = model == "flow" and WAYS[name].is_additive
        is_infeasible = name == "memory" and row.notes[:1] != [] and row.notes[0].startswith("infeasible")
        if is_refused:
            assert row.notes == ["takes additive couplings on two streams only"]
        if is_refused or is_infeasible:
            assert (row.peak, row.seconds, row.is_bitwise, row.is_failed) == (None, None, None, False), (name, setting)
            continue
        assert row.peak and row.seconds and row.first and row.ratio and row.share and not row.is_failed, (name, row)
        assert row.error is not None and row.error < 1e-4, name
        # checkpoints and libraries run BatchNorm twice; inverses without codes round
        is_twice = name in {*LIBRARIES, "checkpoint", "selective"} and model == "revnet"
        assert (row.buffers > 0) == is_twice, name
        rounds = name == "rounding" and model != "flow"  # a flow's inverses divide by data, and so have codes
        assert row.is_bitwise == (name not in LIBRARIES and not rounds and not is_twice), name

    assert (
        peak_of(rows, "convert") < 0.7 * peak_of(rows, "plain") and (rows["convert", None].kept or 0) < plain.kept / 3
    )
    assert peak_of(rows, "checkpoint", 1) < peak_of(rows, "checkpoint", 2) < peak_of(rows, "plain")
    if model == "mlp":
        peaks = [peak_of(rows, "memory", budget) for budget in (80, 60, "least")]
        assert peaks[0] <= 0.8 * plain.peak and peaks[2] < peaks[1] <= 0.6 * plain.peak
        assert rows["memory", 20].notes[0].startswith("infeasible: the least budget is ")


def test_ways_over_eager_kernels_that_torch_compiles() -> None:
    chosen = [WAYS[name] for name in ("plain", "torch-budget", "backend-eager")]
    rows = rows_of("mlp", chosen)
    plain, ours = rows["plain", None], rows["backend-eager", None]
    assert plain.peak and ours.kept and plain.kept and ours.kept < plain.kept / 4
    assert all(row.error is not None and row.error < 1e-5 and not row.notes for row in rows.values())
    peaks = [rows["torch-budget", budget].peak or 0 for budget in (0.7, 0.3)]
    assert peaks[1] < 0.8 * peaks[0] < 0.8 * plain.peak, "each budget has compiled code of its own"


def test_compiled_blocks_are_for_plain_and_budgets_alone() -> None:
    sizes = Sizes(2, 8, is_compiled=True)
    notes = {name: Contender(MODELS["mlp"], WAYS[name], None, sizes).row.notes for name in WAYS}
    assert notes.pop("plain") == notes.pop("memory") == []
    assert all(note == ["not with `--compile`"] for note in notes.values())


# --- failures
def way_of(build: Callable[[Task, Any], Any], limit: float | None = 0) -> Way:
    return Way("mine", "mine", build, limit=limit)


def wrong(task: Task, setting: Any) -> Any:
    """A forward whose gradients are twice as large, with the same loss."""

    def call(x: Tensor) -> Tensor:
        y = task.model(x)
        return 2 * y - y.detach()

    return call


def raises(task: Task, setting: Any) -> Any:
    raise ValueError("no such luck\nnor another line")


def within_nothing(task: Task, setting: Any) -> Any:
    task.budget_bytes = 1
    return task.model


def forgets(task: Task, setting: Any) -> Any:
    """A forward in which a parameter has no gradient."""
    model: Any = task.model
    model.head.bias.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("build", "note"),
    [
        (wrong, "WRONG gradients"),
        (forgets, "WRONG gradients"),
        (raises, "raises ValueError: no such luck"),
        (within_nothing, "EXCEEDS its budget of 1 bytes"),
    ],
)
def test_failures_are_noted(build: Callable[[Task, Any], Any], note: str) -> None:
    row = rows_of("mlp", [WAYS["plain"], way_of(build)], batch=8)["mine", None]
    assert row.is_failed and note in row.notes[0] and "\n" not in row.notes[0]


def test_errors_of_other_peoples_ways_are_reported() -> None:
    rows = rows_of("mlp", [WAYS["plain"], way_of(wrong, None), way_of(raises, None)], batch=8)
    assert rows["mine", None].notes == ["raises ValueError: no such luck"] and not rows["mine", None].is_failed
    row = rows_of("mlp", [WAYS["plain"], way_of(wrong, None)], batch=8)["mine", None]
    assert row.error == pytest.approx(1.0) and row.is_bitwise is False and not row.is_failed
    assert math.isnan(rows_of("mlp", [WAYS["plain"], way_of(forgets, None)], batch=8)["mine", None].error or 0)


def test_an_error_in_a_later_step_ends_a_way_alone() -> None:
    def third(task: Task, setting: Any) -> Any:
        calls: list[int] = []

        def call(x: Tensor) -> Tensor:
            calls.append(1)
            if len(calls) == 6:  # one step, three measured, one round
                raise ValueError("worn out")
            return task.model(x)

        return call

    rows = rows_of("mlp", [WAYS["plain"], way_of(third)], batch=8, rounds=2)
    assert rows["mine", None].notes == ["raises ValueError: worn out"] and rows["mine", None].seconds is None
    assert rows["plain", None].seconds


def test_the_exit_status_is_that_of_revfx(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ("--models", "mlp", "--depth", "2", "--batch", "8", "--rounds", "1", "--ways", "convert")
    for limit, status in ((0, 1), (None, 0)):
        monkeypatch.setattr(run, "WAYS", {**WAYS, "convert": replace(WAYS["convert"], build=raises, limit=limit)})
        found, out, _ = run_bench(capsys, *argv)
        assert found == status and "- revfx.convert (mlp): raises ValueError: no such luck" in out


# --- what is printed
def test_text_and_markdown(capsys: pytest.CaptureFixture[str]) -> None:
    argv = (
        "--short",
        "--models",
        "mlp,flow",
        "--ways",
        "convert,rev_block,memory",
        "--budgets",
        "70",
        "--threads",
        "1",
    )
    status, out, err = run_bench(capsys, *argv)
    lines = out.splitlines()
    assert status == 0 and err == "" and lines[0].split()[:4] == ["model", "way", "kept", "peak"]
    found = [" ".join(line.split()).split(" MiB")[0].rsplit(" ", 1)[0] for line in lines if line.endswith(" bits")]
    assert found == [
        "mlp plain autograd", "mlp revfx.convert", "mlp revfx.rev_block", "mlp revfx.convert, memory 70%",
        "flow plain autograd", "flow revfx.convert", "flow revfx.convert, memory 70%",
    ]  # fmt: skip
    assert "- revfx.rev_block (flow): takes additive couplings on two streams only" in lines
    assert lines[-1].startswith(f"(`python examples/bench {' '.join(argv)}`; ") and "threads: 1" in lines[-1]

    table = run_bench(capsys, "--short", "--models", "mlp", "--ways", "convert", "--markdown")[1].splitlines()
    assert table[1] == "|---|---|---:|---:|---:|---:|---:|---:|---:|"
    rows = [line for line in table if line.startswith("| mlp |")]
    assert len(rows) == 2 and all(row.count("|") == 10 and row.endswith(" bits |") for row in rows)
    assert rows[1].startswith("| mlp | `revfx.convert` | ")


def test_python_examples_bench() -> None:
    argv = [sys.executable, str(BENCH), "--models", "mlp", "--ways", "convert", "--depth", "2", "--batch", "8"]
    done = subprocess.run([*argv, "--rounds", "1"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr == "" and done.stdout.count(" bits\n") == 2


# --- the table of counts
def test_the_table_of_counts(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "WAYS", {**WAYS, "selective": replace(WAYS["selective"], compiles="model")})
    words = "--short --models mlp,encoder --ways checkpoint,selective,convert --card H100"
    status, out, _ = run_bench(capsys, *words.split())
    lines = out.splitlines()
    head = next(i for i, line in enumerate(lines) if "launches" in line)
    assert status == 0 and lines[head].endswith("time/plain") and "H100 step" in lines[head]
    assert "- selective checkpoint of each block (mlp, encoder): kernels of compiled code are not counted" in lines
    rows = [line.split() for line in lines[head + 1 :] if line.startswith(("mlp", "encoder"))]
    assert len(rows) == 2 * 5, "plain, three settings of checkpoint, and convert"
    plain, checkpointed = rows[0], rows[1]
    counts = count(Sizes(3, 256).make(MODELS["mlp"]), WAYS["plain"], None)
    milliseconds = f"{1e3 * counts.seconds(CARDS['H100']):.3f}"
    mib = f"{counts.nbytes / 2**20:.2f}"
    assert plain[-8:] == [str(counts.launches), "0.0", mib, "MiB", "0.0", milliseconds, "ms", "1.00"]
    assert int(checkpointed[-8]) > counts.launches and float(checkpointed[-7]) > 0 and float(checkpointed[-1]) > 1

    out = run_bench(capsys, "--short", "--models", "mlp", "--ways", "plain", "--count", "--markdown")[1]
    assert "| model | way | launches | +/coupling | traffic | +bytes/element |" in out.splitlines()


@pytest.mark.parametrize("name", TINY_MODELS)
def test_streams_of_tiny_models_have_codes(name: str) -> None:
    model: Any = TINY_MODELS[name].make(2).model
    streams = model.enter(*TINY_MODELS[name].make(2).args)
    assert [t.nbytes for t in streams[:2]] == [8192, 8192]


# --- wrong arguments
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--models resnet", "unknown model 'resnet'; known: mlp, revnet, transformer,"),
        ("--models mlp,resnet", "unknown model 'resnet'"),
        ("--ways plain,deepspeed", "unknown way 'deepspeed'; known: plain, checkpoint, selective,"),
        ("--depth 0", "0: it must be positive"),
        ("--rounds -1", "-1: it must be positive"),
        ("--threads x", "invalid _positive value: 'x'"),
        ("--budgets 120", "give percentages of plain's peak, or least"),
        ("--budgets 80,most", "give percentages of plain's peak, or least"),
        ("--device tpu", "--device tpu: use cpu or cuda"),
        ("--card H1000", "unknown card 'H1000'; known: H100, A100,"),
        ("--tiny --models encoder", "unknown model 'encoder'; known: mlp, revnet, transformer, flow, leapfrog"),
    ],
)
def test_wrong_arguments(capsys: pytest.CaptureFixture[str], words: str, message: str) -> None:
    status, out, err = run_bench(capsys, *words.split())
    assert status == 2 and out == "" and message in err


def test_packages_that_are_missing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("revlib", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    status, out, err = run_bench(capsys, "--ways", "convert,revlib")
    assert status == 2 and out == "" and "--ways revlib: `revlib` is not installed: pip install 'revfx[bench]'" in err
    status, out, err = run_bench(capsys, "--models", "gpt2")
    assert status == 2 and "--models gpt2: `transformers` is not installed: pip install 'transformers'" in err
    row = rows_of("mlp", [WAYS["plain"], WAYS["revlib"]], batch=8)["revlib", None]
    assert row.notes == ["`revlib` is not installed: pip install 'revfx[bench]'"] and not row.is_failed


def test_no_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, _, err = run_bench(capsys, "--device", "cuda:1")
    assert status == 2 and "--device cuda:1: torch finds no GPU" in err


# --- models
@pytest.mark.parametrize("name", [name for name, model in MODELS.items() if not model.library])
def test_tasks_are_repeatable_and_draw_nothing(name: str) -> None:
    before = torch.get_rng_state()
    first, second = (MODELS[name].make(2, 2) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    weights = second.model.state_dict()
    assert all(torch.equal(tensor, weights[key]) for key, tensor in first.model.state_dict().items())
    assert all(torch.equal(a, b) and len(a) == 2 for a, b in zip(first.args, second.args, strict=True))
    assert len(first.blocks) >= 1 and first.model.training


@pytest.mark.parametrize("name", [name for name in CHAINS if name != "flow"])
def test_f_and_g_make_the_same_model(name: str) -> None:
    task = MODELS[name].make(4, 8)
    model: Any = task.model
    a, b = model.enter(*task.args)
    couplings = [block for block in model.blocks if isinstance(block, Coupling)]
    assert len(couplings) == 4
    for block in couplings:
        a = a + block.f(b)
        b = b + block.g(a)
    torch.testing.assert_close(model.leave(a, b), model(*task.args))


def test_the_log_determinant_of_a_flow_is_that_of_its_jacobian() -> None:
    torch.manual_seed(0)
    flow, x = Flow(2).double(), torch.randn(1, 64, dtype=torch.float64)

    def outputs(x: Tensor) -> Tensor:
        state = flow.enter(x[None])
        for block in flow.blocks:
            state = block(*state)
        return torch.cat(state[:2], -1)[0]

    jacobian: Any = torch.autograd.functional.jacobian(outputs, x[0])
    z = outputs(x[0])
    normal = -0.5 * (z.square() + math.log(2 * math.pi)).sum()
    torch.testing.assert_close(flow(x)[0] - normal, torch.linalg.slogdet(jacobian).logabsdet, rtol=1e-5, atol=1e-5)
