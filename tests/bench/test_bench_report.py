"""What the bench found, as text, Markdown, CSV, JSON and pictures."""

from __future__ import annotations

import csv
import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from revfx.bench import report as bench_report
from revfx.bench.results import Fit, Machine, Report, Row, this_machine
from revfx.errors import RevfxError


MIB = 2**20
MACHINE = Machine("a processor", 2, 1, "2.13.0", "3.11.7")
PLAIN = Row("mlp", "plain", 16, 2048, 4 * MIB, 100 * MIB, 120 * MIB, 0.2, 1.0, 1.0, 1.0, 0.25, 1e-7)
OURS = replace(
    PLAIN, way="convert", kept=2 * MIB, peak=12 * MIB, seconds=0.25, ratio=1.25, ratio_low=1.2, ratio_high=1.3
)
ABSENT = Row("mlp", "revlib", 16, 2048, notes=("not installed",))
FAILED = Row("mlp", "memcnn", 16, 2048, notes=("raises ValueError: no",), failed=True)
STEPS = Report("revfx bench", MACHINE, (PLAIN, ABSENT, FAILED, OURS))
SWEEP = Report(
    "revfx bench --sweep depth",
    MACHINE,
    tuple(
        Row("mlp", way, depth, 64, 0, kept * MIB, 2 * kept * MIB)
        for way, kept_of in (("plain", lambda d: 8 * d), ("convert", lambda d: 3))
        for depth in (4, 8)
        for kept in (kept_of(depth),)
    ),
    sweep="depth",
)
FITS = Report(
    "revfx bench --memory 1GiB",
    MACHINE,
    fits=(
        Fit("mlp", "plain", "depth", 64, 1024 * MIB, 100, 101),
        Fit("mlp", "plain", "batch", 16, 1024 * MIB, 64, 70),
        Fit("mlp", "convert", "depth", 64, 1024 * MIB, 4096, None),
        Fit("mlp", "convert", "batch", 16, 1024 * MIB, 512, 520),
        Fit("mlp", "revlib", "depth", 64, 1024 * MIB, notes=("not installed",)),
        Fit("mlp", "revlib", "batch", 16, 1024 * MIB, notes=("not installed",)),
    ),
)


def test_text_of_steps() -> None:
    lines = bench_report.text(STEPS).splitlines()
    assert lines[:2] == [
        "a processor, 2 cores, 1 thread; torch 2.13.0, Python 3.11.7",
        "revfx bench",
    ]
    assert lines[3] == "coupling MLP (mlp), depth 16, batch 2048"
    assert lines[4].split() == [
        *("way", "kept", "peak", "of", "plain's", "step", "of", "plain's", "first", "step", "gradients", "off", "by")
    ]
    assert " ".join(lines[5].split()) == (
        "plain autograd 100.0 MiB 120.0 MiB 1.00 200.0 ms 1.00 (1.00..1.00) 0.2 s 1.0e-07"
    )
    assert " ".join(lines[6].split()) == "revfx.convert 2.0 MiB 12.0 MiB 0.10 250.0 ms 1.25 (1.20..1.30) 0.2 s 1.0e-07"
    assert len({len(line) for line in lines[4:7]}) == 1, "columns are aligned"
    assert lines[7:9] == ["RevLib: not installed", "MemCNN: raises ValueError: no"]


def test_markdown_of_steps() -> None:
    parts = bench_report.markdown(STEPS).split("\n\n")
    assert parts[0] == "**coupling MLP (`mlp`), depth 16, batch 2048**"
    table = parts[1].splitlines()
    assert table[1].count("---:") == 7 and all(line.count("|") == 9 for line in table) and len(table) == 4
    assert table[3].startswith("| `revfx.convert` | 2.0 MiB | 12.0 MiB | 0.10 | 250.0 ms | 1.25 (1.20..1.30) |")
    assert parts[2] == "- RevLib: not installed\n- MemCNN: raises ValueError: no"
    assert parts[3].startswith("(`revfx bench`; a processor, 2 cores, 1 thread; torch 2.13.0")


def test_a_note_that_several_share_is_given_once() -> None:
    two = replace(STEPS, rows=(PLAIN, ABSENT, replace(ABSENT, way="memcnn")))
    assert next(bench_report.tables(two)).notes == ("RevLib, MemCNN: not installed",)


def test_a_sweep_shows_the_growth() -> None:
    (table,) = bench_report.tables(SWEEP)
    assert table.heading == "coupling MLP (`mlp`), batch 64: peak (kept)"
    assert table.head == ("way", "depth 4", "depth 8")
    assert table.rows == (
        ("plain autograd", "64.0 MiB (32.0 MiB)", "128.0 MiB (64.0 MiB)"),
        ("`revfx.convert`", "6.0 MiB (3.0 MiB)", "6.0 MiB (3.0 MiB)"),
    )


def test_fits_say_what_did_not() -> None:
    (table,) = bench_report.tables(FITS)
    assert table.heading == "coupling MLP (`mlp`), the largest in 1024.0 MiB"
    assert table.head == ("way", "depth, at batch 64", "batch, at depth 16")
    assert table.rows == (
        ("plain autograd", "100 (not 101)", "64 (not 70)"),
        ("`revfx.convert`", ">= 4096", "512 (not 520)"),
    )
    assert table.notes == ("RevLib: not installed",)


def test_csv_and_json_hold_everything() -> None:
    rows = list(csv.DictReader(io.StringIO(bench_report.as_csv(STEPS))))
    assert [r["way"] for r in rows] == ["plain", "revlib", "memcnn", "convert"]
    assert rows[3]["peak"] == str(12 * MIB) and rows[3]["ratio"] == "1.25" and rows[1]["peak"] == ""
    assert rows[2]["notes"] == "raises ValueError: no" and rows[2]["failed"] == "True"
    fits = list(csv.DictReader(io.StringIO(bench_report.as_csv(FITS))))
    assert fits[2]["largest"] == "4096" and fits[2]["over"] == ""
    found = json.loads(bench_report.as_json(STEPS))
    assert found["machine"]["threads"] == 1 and found["rows"][0]["kept"] == 100 * MIB and found["sweep"] is None


@pytest.mark.parametrize("report", [STEPS, SWEEP, FITS], ids=["steps", "sweep", "fits"])
def test_pictures(report: Report, tmp_path: Path) -> None:
    both = replace(
        report,
        rows=(*report.rows, *(replace(r, model="flow") for r in report.rows)),
        fits=(*report.fits, *(replace(f, model="flow") for f in report.fits)),
    )
    for number, r in enumerate((report, both)):
        bench_report.plot(r, tmp_path / f"{number}.svg")
    one, two = ((tmp_path / f"{n}.svg").read_text() for n in range(2))
    assert "coupling MLP" in one and "convert" in one and "affine flow" not in one
    assert "affine flow" in two and two.count("<path") > one.count("<path")


def test_without_matplotlib_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(RevfxError, match=r"`--plot` needs matplotlib: pip install 'revfx\[viz\]'"):
        bench_report.plot(STEPS, "unused.svg")


def test_this_machine_has_a_name() -> None:
    machine = this_machine("cpu")
    assert machine.processor and machine.cores > 0 and machine.threads > 0
    assert str(replace(machine, threads=2)).startswith(
        f"{machine.processor}, {machine.cores} cores, 2 threads; torch 2."
    )
