"""The command line: what it prints, its exit status, and no traceback whatever is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from revfx.cli import main
from revfx.cli_models import WrongArguments, load, tensor
from revfx.errors import RevfxError


MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, d=8):
        super().__init__()
        self.f = nn.ModuleList(nn.Sequential(nn.Linear(d, 4 * d), nn.Tanh(), nn.Linear(4 * d, d)) for _ in range(8))

    def forward(self, x):
        a, b = x.chunk(2, dim=-1)
        for f in self.f:
            a, b = b, a + f(b)
        return torch.cat([a, b], -1)

def plain():
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU())

def with_inputs():
    return Net(), torch.randn(32, 16)

def broken():
    raise RuntimeError("no weights here")

def number():
    return 3

ready = Net()
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "a_model.py"
    path.write_text(MODEL)
    return str(path)


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a command."""
    try:
        status = main(argv)
    except SystemExit as e:  # argparse
        status = int(e.code or 0)
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return status, out, err


@pytest.mark.parametrize("name", ["Net", "ready", "with_inputs"])
def test_explain_prints_regions(capsys: pytest.CaptureFixture[str], file: str, name: str) -> None:
    shapes = [] if name == "with_inputs" else ["--input", "32,16"]
    status, out, err = run(capsys, "explain", f"{file}:{name}", *shapes)
    assert status == 0 and err == ""
    assert "1 reversible region, 8 couplings" in out and "invert" in out and "a_model.py:14" in out


def test_explain_as_json(capsys: pytest.CaptureFixture[str], file: str) -> None:
    status, out, _ = run(capsys, "explain", f"{file}:Net", "--input", "32,16", "--json", "--measure")
    found = json.loads(out)
    assert status == 0 and found["regions"][0]["couplings"] == 8
    ways = {w["way"]: w for w in found["ways"]}
    assert ways["revfx"]["peak"] < ways["plain"]["peak"]
    assert -0.1 < ways["revfx"]["peak"] / ways["revfx"]["measured_peak"] - 1 < 0.3  # 6 KB more


def test_explain_with_options(capsys: pytest.CaptureFixture[str], file: str, tmp_path: Path) -> None:
    saved = tmp_path / "found.json"
    common = ("explain", f"{file}:Net", "--input", "64,16")
    status, out, _ = run(capsys, *common, "--rounding", "--save", str(saved))
    assert status == 0 and "up to rounding" in out and f"saved {saved}" in out
    assert not json.loads(saved.read_text())["regions"][0]["lossless"]


def test_explain_for_the_compiler(capsys: pytest.CaptureFixture[str], file: str) -> None:
    status, out, _ = run(capsys, "explain", f"{file}:Net", "--input", "64,16", "--backend", "revfx")
    assert status == 0 and "graph 0: 1 region" in out


def test_nothing_reversible_is_status_1(capsys: pytest.CaptureFixture[str], file: str) -> None:
    status, out, _ = run(capsys, "explain", f"{file}:plain", "--input", "4,16")
    assert status == 1 and "nothing reversible was found" in out and "`relu`" in out


@pytest.mark.parametrize(
    ("argv", "status", "text"),
    [
        (("explain", "missing.py:Net", "--input", "4,16"), 2, "missing.py: no such file"),
        (("explain", "FILE", "--input", "4,16"), 2, "give a file and a name in it"),
        (("explain", "FILE:Nett", "--input", "4,16"), 2, "has no `Nett`; it has Net, plain"),
        (("explain", "FILE:number", "--input", "4,16"), 2, "it gives a int, not a torch.nn.Module"),
        (("explain", "FILE:Net"), 2, "--input 8,3,32,32"),
        (("explain", "FILE:Net", "--input", "4,x"), 2, "give whole numbers"),
        (("explain", "FILE:Net", "--input", "4,-1"), 2, "can't be negative"),
        (("explain", "FILE:Net", "--input", "4,16", "--dtype", "float33"), 2, "'float33' is no dtype"),
        (("explain", "FILE:Net", "--input", "4,16", "--save", "x.pdf"), 2, "must end in .html, .svg or .json"),
        (("explain", "FILE:broken", "--input", "4,16"), 1, "broken() raised RuntimeError: no weights here"),
        (("explain", "FILE:Net", "--input", "4,15"), 1, "RuntimeError: "),
        (("explain",), 2, "the following arguments are required"),
        (("draw",), 2, "invalid choice: 'draw'"),
        (("bench",), 2, "invalid choice: 'bench'"),
    ],
)
def test_what_is_wrong_is_said(
    capsys: pytest.CaptureFixture[str], file: str, argv: tuple[str, ...], status: int, text: str
) -> None:
    given = [a.replace("FILE", file) if a.startswith("FILE:") else a for a in argv]
    found, out, err = run(capsys, *given)
    assert found == status and out == ""
    assert text in err


def test_a_file_that_raises(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text("import nothing_of_this_name\n")
    status, _, err = run(capsys, "explain", f"{path}:Net", "--input", "4")
    assert status == 1 and "raised ModuleNotFoundError" in err


def test_debug_shows_the_traceback(file: str) -> None:
    with pytest.raises(RevfxError, match="no weights here"):
        main(["explain", f"{file}:broken", "--input", "4,16", "--debug"])


def test_without_a_command_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys)
    assert status == 2 and "examples:" in out
    status, out, _ = run(capsys, "--help")
    assert status == 0 and "exit status" in out


def test_pictures_without_matplotlib(
    capsys: pytest.CaptureFixture[str], file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    argv = ("explain", f"{file}:Net", "--input", "32,16", "--save", str(tmp_path / "x.svg"))
    status, _, err = run(capsys, *argv)
    assert status == 1 and "pip install 'revfx[viz]'" in err


def test_inputs() -> None:
    assert tensor("2,3", "float64").dtype == torch.float64
    assert torch.equal(tensor("2:int64", "float32"), torch.zeros(2, dtype=torch.int64))
    assert tensor("", "float32").shape == ()
    with pytest.raises(WrongArguments):
        tensor("2", "nn")
    with pytest.raises(WrongArguments, match="no such file"):
        load("there/is/none.py:f", ["2"], "float32")


def test_python_m_revfx(file: str) -> None:
    argv = [sys.executable, "-m", "revfx", "explain", f"{file}:Net", "--input", "32,16"]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0 and "8 couplings" in done.stdout and done.stderr == ""
    done = subprocess.run([*argv[:-1], "32,15"], capture_output=True, text=True)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "RuntimeError" in done.stderr
