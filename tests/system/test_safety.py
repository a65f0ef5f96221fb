"""Only the file that a command names runs; nothing does that a page, a checkpoint or a name holds."""

from __future__ import annotations

import ast
import io
import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import deep_but
from torch import Tensor, nn
from zoo import Additive, D

import revfx
from revfx.cli import main
from revfx.report.data import RegionInfo, Usage, ValueLine
from revfx.report.explanation import Explanation
from revfx.report.html import page
from revfx.report.memory import memory_svg


ROOT = Path(__file__).parent.parent.parent
RUNS = frozenset("eval exec compile __import__".split())  # as bare names: builtins
LOADERS = frozenset("pickle marshal shelve dill cloudpickle joblib runpy code".split())
ALLOWED = {
    ("revfx/cli_models.py", "exec_module"): "the file that the command line names: the user asks for it to be run",
    ("revfx/engine/checkers.py", "exec"): "checkers: made of operators that ran, as names and numbers",
    ("revfx/engine/replaying.py", "compile"): "replays: graphs of operators that ran, as torch.fx writes them out",
    ("revfx/engine/replaying.py", "exec"): "the same",
    ("revfx/engine/native.py", "exec_module"): "the extension that is built from the package's own sources",
}


def _findings(path: Path) -> list[tuple[str, str]]:
    """(file, what) for everything in a source that could run or load what it is given."""
    name = str(path.relative_to(ROOT))
    found: list[tuple[str, str]] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [(name, m) for m in modules if m.split(".")[0] in LOADERS]
        elif isinstance(node, ast.Call):
            f = node.func
            if isinstance(f, ast.Name) and f.id in RUNS:
                found.append((name, f.id))
            elif isinstance(f, ast.Attribute) and f.attr in (
                "exec_module",
                "run_path",
                "run_module",
                "system",
                "popen",
            ):
                found.append((name, f.attr))
            elif isinstance(f, ast.Attribute) and ast.unparse(f) in ("torch.load", "torch.jit.load", "np.load"):
                safe = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
                found += [] if safe else [(name, ast.unparse(f))]
            if any(k.arg == "shell" for k in node.keywords):
                found.append((name, "shell"))
    return found


def test_no_source_runs_or_unpickles_what_it_is_given() -> None:
    sources = [*(ROOT / "revfx").glob("**/*.py"), *(ROOT / "passes").glob("**/*.py")]
    assert len(sources) > 80
    assert {f for path in sources for f in _findings(path)} == set(ALLOWED)


@pytest.mark.parametrize(
    "line", ["eval('1')", "import pickle", "torch.load('x')", "torch.load('x', weights_only=False)", "run(shell=True)"]
)
def test_the_search_sees_what_it_looks_for(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.py").write_text(line)
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert len(_findings(tmp_path / "x.py")) == 1


def test_checkpoints_of_a_converted_model_hold_tensors_only_and_go_both_ways() -> None:
    def trained(model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.randn(6, 2 * D)).square().mean().backward()
        optimizer.step()
        return model, optimizer

    def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    x: Tensor = torch.randn(6, 2 * D)
    for make, other in ((revfx.convert, lambda m: m), (lambda m: m, revfx.convert)):
        model, optimizer = trained(make(Additive(4)))
        held = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        back: nn.Module = other(Additive(4))
        back.load_state_dict(held["model"])
        torch.optim.AdamW(back.parameters()).load_state_dict(held["optimizer"])
        assert torch.equal(back(x), model(x))


# --- the command line
MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.ModuleList(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)) for _ in range(4))

    def forward(self, x):
        a, b = x.chunk(2, dim=-1)
        for f in self.f:
            a, b = b, a + f(b)
        return torch.cat([a, b], -1)
"""
CRIES = "import pathlib\npathlib.Path(__file__).with_suffix('.ran').write_text('')\n"
# of the standard library, some of which torch and revfx import late, and names that other tools run by themselves
BESIDE = "random json cProfile wave colorsys statistics sitecustomize usercustomize conftest setup other"


def explain(where: Path, file: Path, *more: str, code: str = "") -> subprocess.CompletedProcess[str]:
    start = f"import sys; sys.path.pop(0); from revfx.cli import main; {code}sys.exit(main(sys.argv[1:]))"
    argv = [sys.executable, "-c", start, "explain", f"{file}:Net", "--input", "8,8", *more]
    return subprocess.run(argv, cwd=where, capture_output=True, text=True, check=False)


def test_only_the_named_file_runs(tmp_path: Path) -> None:
    for name in BESIDE.split():
        (tmp_path / f"{name}.py").write_text(CRIES)
    (tmp_path / "page.html").write_text("<script>1</script>")
    (tmp_path / "model.py").write_text(MODEL + "import wave, colorsys\n")
    done = explain(tmp_path, tmp_path / "model.py", "--save", str(tmp_path / "found.json"))
    assert done.returncode == 0 and "4 couplings" in done.stdout, done.stderr
    assert sorted(p.name for p in tmp_path.glob("*.ran")) == []
    assert json.loads((tmp_path / "found.json").read_text())["regions"][0]["couplings"] == 4


def test_what_the_file_imports_from_beside_it_runs(tmp_path: Path) -> None:
    (tmp_path / "other_of_mine.py").write_text(CRIES)
    (tmp_path / "model.py").write_text(MODEL + "import other_of_mine\n")
    assert explain(ROOT, tmp_path / "model.py").returncode == 0
    assert [p.name for p in tmp_path.glob("*.ran")] == ["other_of_mine.ran"]


@pytest.mark.parametrize("name", deep_but(("wave",), ("wave", "torch")))
def test_a_file_with_the_name_of_another_module_does_not_stand_in_its_place(name: str, tmp_path: Path) -> None:
    (tmp_path / f"{name}.py").write_text(MODEL)
    stands = f"hasattr(importlib.import_module('{name}'), 'Net')"
    check = f"import importlib; real = main; main = lambda a: real(a) or {stands}; "
    done = explain(tmp_path, tmp_path / f"{name}.py", code=check)
    assert done.returncode == 0 and "4 couplings" in done.stdout, done.stderr


def test_what_is_saved_to_is_written_and_never_run(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(MODEL)
    target = tmp_path / "found.json"
    target.write_text(CRIES)
    assert explain(tmp_path, tmp_path / "model.py", "--save", str(target)).returncode == 0
    assert json.loads(target.read_text())["model"] == "Net" and not list(tmp_path.glob("*.ran"))
    argv = ["explain", f"{tmp_path / 'model.py'}:Net", "--input", "8,8", "--save", str(tmp_path / "found.py")]
    assert main(argv) == 2 and not (tmp_path / "found.py").exists()


# --- pages and pictures
ODD = "<script>alert(1)</script>\"'&]]>"


@pytest.fixture
def odd() -> Explanation:
    """An explanation of a model whose class, sub-modules and file have such a name."""
    line = ValueLine(ODD, ODD, "invert", ODD, f"/{ODD}/m.py:1", 0)
    region = RegionInfo(ODD, ODD, ODD, "additive", 1, 1, (ODD,), (), 1, 1, 1, False, (line,))
    made = revfx.explain(type(ODD, (Additive,), {})(4), torch.randn(6, 2 * D))
    assert ODD in made.model
    usage = Usage("plain", 1, 2, live=(1, 2, 1), backward=2)
    return Explanation(ODD, (ODD,), (region,), (), ways=(usage,), notes=(str(made),))


def test_a_page_and_a_picture_show_names_and_run_none(odd: Explanation, tmp_path: Path) -> None:
    source = page(odd)
    assert "<script" not in source
    picture = ET.fromstring(memory_svg(odd))
    tags = {e.tag.rpartition("}")[2] for e in picture.iter()}
    assert "script" not in tags and "foreignObject" not in tags
    assert not any(k.lower().startswith("on") for e in picture.iter() for k in e.attrib)
    assert any("<script>" in (e.text or "") for e in picture.iter())
    odd.save(tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text()) == json.loads(json.dumps(odd.to_dict()))
    assert json.loads((tmp_path / "x.json").read_text())["model"] == ODD


def test_control_characters_leave_a_picture_well_formed(tmp_path: Path) -> None:
    usage = Usage("plain", 1, 2, live=(1, 2, 1), backward=2)
    e = Explanation("Net\x00\x08\x1b[31m", ("f32[\x0b]",), (), (), ways=(usage,))
    ET.fromstring(memory_svg(e))
    assert "\x00" not in page(e)
