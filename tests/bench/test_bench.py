"""`revfx bench` from its arguments to what it prints, writes and returns."""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from revfx.bench import command as bench
from revfx.bench.fit import Question
from revfx.bench.models import MODELS
from revfx.bench.options import ARGUMENTS, WRITTEN, Options, options_of, parse_size, words_of
from revfx.bench.results import Fit, Report, Row, this_machine
from revfx.bench.ways import WAYS
from revfx.cli import main
from revfx.errors import WrongArguments


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(exit_on_error=False)
    for name, given in ARGUMENTS.items():
        parser.add_argument(f"--{name}", **given)
    return parser.parse_args(words)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The bench in this process."""
    for name, value in bench.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    return lambda *words: main(("bench", *words))


# --- runs
def test_a_quick_run_compares_what_is_there(here: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert here("--quick", "--threads", "1", "--json") == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert err == "" and found["command"] == "revfx bench --quick --threads 1"
    rows = {(r["model"], r["way"]): r for r in found["rows"]}
    expected = {(m, w) for m in MODELS for w, way in WAYS.items() if not way.compiled}
    assert set(rows) == expected
    for name in MODELS:
        plain, ours = rows[name, "plain"], rows[name, "convert"]
        assert ours["peak"] < 0.7 * plain["peak"] and ours["kept"] < 0.2 * plain["kept"]
        assert plain["ratio"] == 1.0 and ours["ratio_low"] <= ours["ratio"] <= ours["ratio_high"]
        assert ours["error"] < 10 * plain["error"] < 1e-3
        assert (plain["depth"], plain["batch"]) == (4, MODELS[name].batch // 2)
        assert "log-determinant" in rows["flow", "rev_block"]["notes"][0]


@pytest.mark.deep
def test_figures_are_written_and_printed_by_a_process_with_an_allocator_that_keeps(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in bench.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    paths = {name: tmp_path / f"out.{name}" for name in ("csv", "json", "svg")}
    words = ("--csv", str(paths["csv"]), "--json", str(paths["json"]), "--plot", str(paths["svg"]), "--markdown")
    sizes = ("--quick", "--models", "leapfrog", "--ways", "convert", "--batch", "8")
    assert main(("bench", *sizes, *words)) == 0
    out, err = capfd.readouterr()
    assert err == "" and "| `revfx.convert` |" in out
    assert "`revfx bench --models leapfrog --ways plain convert --batch 8 --quick`" in out
    assert [r["way"] for r in csv.DictReader(paths["csv"].read_text().splitlines())] == ["plain", "convert"]
    assert json.loads(paths["json"].read_text())["rows"][1]["way"] == "convert"
    assert "leapfrog steps" in paths["svg"].read_text()


def test_a_sweep_shows_that_memory_grows_and_that_it_does_not(
    here: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ("--at", "4", "8", "--models", "mlp", "--batch", "64")
    assert here("--sweep", "depth", *sizes, "--ways", "convert", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    kept = {(r["way"], r["depth"]): r["kept"] for r in found["rows"]}
    assert kept["plain", 8] > 1.8 * kept["plain", 4]
    growth = [kept[way, 8] - kept[way, 4] for way in ("convert", "plain")]
    assert 0 < growth[0] < 0.05 * growth[1], "its codes"
    assert here("--sweep", "batch", *sizes[:5], "--depth", "2", "--ways", "plain") == 0
    out = capsys.readouterr().out
    assert "coupling MLP (mlp), depth 2: peak (kept)" in out and "batch 4" in out and "batch 8" in out


def test_the_largest_of_both_sizes_is_asked_of_every_way(
    here: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(q: Question) -> Fit:
        assert (q.model, q.memory, q.device, q.threads, q.seconds) == ("flow", 2**30, "cpu", 1, 5.0)
        return Fit(q.model, q.way, q.sweep, q.other, q.memory, {"depth": 100, "batch": 200}[q.sweep], None)

    monkeypatch.setattr(bench, "largest", answer)
    words = ("--models", "flow", "--ways", "convert", "--depth", "8", "--threads", "1", "--seconds", "5")
    assert here("--memory", "1GiB", *words) == 0
    table = capsys.readouterr().out.splitlines()[3:7]
    assert table[0] == "affine flow (flow), the largest in 1024.0 MiB"
    assert table[1].split() == ["way", "depth,", "at", "batch", "4096", "batch,", "at", "depth", "8"]
    assert [" ".join(line.split()) for line in table[2:]] == [
        "plain autograd >= 100 >= 200",
        "revfx.convert >= 100 >= 200",
    ]


def test_the_status_tells_of_what_is_wrong_with_revfx_and_not_with_others(
    here: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def found(way: str) -> Callable[[Options], Report]:
        row = Row("mlp", way, 4, 8, notes=("WRONG gradients",), failed=True)
        return lambda options: Report("revfx bench", this_machine("cpu"), (row,))

    for way, status in (("convert", 1), ("backend", 1), ("plain", 1), ("revlib", 0), ("inductor", 0)):
        monkeypatch.setattr(bench, "measured", found(way))
        assert here("--quick") == status, way
        assert "WRONG gradients" in capsys.readouterr().out


def test_a_measuring_process_that_is_killed_is_told_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)
    monkeypatch.setattr(bench.subprocess, "run", lambda *args, **options: subprocess.CompletedProcess(args, -9))
    assert main(("bench", "--quick")) == 1
    assert capsys.readouterr().err == "revfx bench: the process that measures ended with status -9.\n"


# --- arguments
@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--models resnet", "unknown model 'resnet'; known: mlp, revnet, transformer, flow, leapfrog."),
        ("--models mlp,resnet", "unknown model 'resnet'"),
        ("--ways plain deepspeed", "unknown way 'deepspeed'; known: plain, checkpoint, inductor,"),
        ("--depth 0", "`--depth 0`: it must be positive."),
        ("--rounds -1", "`--rounds -1`: it must be positive."),
        ("--threads 0", "`--threads 0`"),
        ("--sweep width", "`--sweep width` is not known; use depth or batch."),
        ("--at 4 8", "give `--sweep depth` or `--sweep batch`"),
        ("--sweep depth --at 4 0", "`--at 4 0`: they must be positive."),
        ("--memory 5parsecs", "`--memory 5parsecs`: use a number with KiB, MiB or GiB"),
        ("--sweep depth --memory 1GiB", "give one of them"),
        ("--device tpu", "`--device tpu` is not known; use cpu or cuda."),
        ("--csv /no/such/folder/x.csv", "`--csv /no/such/folder/x.csv`: there is no such folder."),
    ],
)
def test_what_makes_no_sense_is_said_at_once(words: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(("bench", *words.split())) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("revfx bench: ") and says in err and "Traceback" not in err


def test_what_is_missing_is_said_at_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(("bench", "--plot", "out.svg")) == 2
    assert capsys.readouterr().err == "revfx bench: `--plot` needs matplotlib: pip install 'revfx[viz]'\n"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(("bench", "--device", "cuda")) == 2
    assert "this torch sees no GPU" in capsys.readouterr().err


def test_sizes_of_memory() -> None:
    assert [parse_size(s) for s in ("100", "1KiB", "512 MiB", "1.5GiB", "2gb")] == [
        100, 2**10, 2**29, 3 * 2**29, 2 * 10**9,
    ]  # fmt: skip
    for wrong in ("", "MiB", "-1GiB", "1TiB", "0MiB"):
        with pytest.raises(WrongArguments):
            parse_size(wrong)


def test_defaults() -> None:
    full, quick = options_of(parsed()), options_of(parsed("--quick"))
    assert full.models == tuple(MODELS) and full.ways == tuple(WAYS) and full.sizes("mlp") == (16, 2048)
    assert quick.rounds == 2 and not any(WAYS[w].compiled for w in quick.ways)
    assert options_of(parsed("--quick", "--ways", "backend")).ways == ("plain", "backend")
    sweep = options_of(parsed("--sweep", "batch"))
    assert sweep.swept("mlp") == (512, 1024, 2048, 4096) and not any(WAYS[w].compiled for w in sweep.ways)
    assert options_of(parsed("--sweep", "depth")).swept("flow") == (4, 8, 16, 32)


@pytest.mark.parametrize(
    ("words", "command"),
    [
        ("", "revfx bench"),
        ("--quick --json --markdown --csv x.csv", "revfx bench --quick"),
        ("--rounds 3 --models flow,mlp", "revfx bench --models mlp flow --rounds 3"),
        ("--ways convert --sweep depth --at 2 4", "revfx bench --ways plain convert --sweep depth --at 2 4"),
        ("--memory 1MiB --seconds 5", "revfx bench --memory 1048576 --seconds 5.0"),
    ],
)
def test_the_command_is_the_one_that_makes_the_figures(words: str, command: str) -> None:
    options = options_of(parsed(*words.split()))
    assert " ".join(words_of(options, WRITTEN)) == command
    again = options_of(parsed(*command.split()[2:]))
    assert words_of(again) == command.split() and (again.models, again.ways) == (options.models, options.ways)
