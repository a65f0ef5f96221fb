"""What is installed, what it imports, and in which direction."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import sys
from pathlib import Path

import pytest

import revfx
import revfx.passes.regions


PUBLIC = {"convert", "rev_block", "RevBlock", "register_inverse", "testing", "RevfxError", "NotReversibleError"}
TESTING = {"assert_same_grads", "check_inverse", "measure_memory", "store_activations"}


def _files(package: str) -> list[Path]:
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations is not None
    return sorted(Path(next(iter(spec.submodule_search_locations))).glob("*.py"))


def _imports(file: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found.update(names if node.module in ("revfx", "revfx.passes") else [node.module])
    return found


def test_the_fixed_public_names_are_there() -> None:
    assert PUBLIC <= set(dir(revfx))
    assert TESTING <= set(dir(revfx.testing))
    assert revfx.__version__ == importlib.metadata.version("revfx")


@pytest.mark.parametrize("file", _files("revfx.passes"), ids=lambda f: f.name)
def test_passes_import_nothing_of_revfx_but_errors_and_rules(file: Path) -> None:
    mine = {m for m in _imports(file) if m.startswith("revfx") and not m.startswith("revfx.passes")}
    assert mine <= {"revfx.errors", "revfx.rules"}


def test_the_executor_finds_nothing_and_the_rules_know_no_graph_pass() -> None:
    files = {f.name: _imports(f) for f in _files("revfx")}
    searching = {f"revfx.passes.{name}" for name in ("arcs", "atoms", "bounds", "diagnose", "masks", "rewrite")}
    assert not files["executor.py"] & searching
    assert not any(m.startswith("revfx.passes") for n in ("rules.py", "rules_layout.py", "errors.py") for m in files[n])


def test_private_torch_api_is_used_in_one_module() -> None:
    private = ("torch._C", "torch._subclasses", "torch._functorch", "torch._dynamo", "torch._inductor")
    for file in _files("revfx") + _files("revfx.passes"):
        if file.name != "_torch.py":
            assert not any(m.startswith(private) for m in _imports(file)), file
            assert "torch._C" not in file.read_text(), file


def test_passes_are_one_package_and_types_are_installed() -> None:
    assert "passes" not in sys.modules
    assert revfx.passes.regions.__name__ == "revfx.passes.regions"
    assert (Path(revfx.__file__).parent / "py.typed").exists()


def test_no_file_is_longer_than_500_lines() -> None:
    for file in _files("revfx") + _files("revfx.passes") + sorted(Path(__file__).parent.glob("*.py")):
        assert len(file.read_text().splitlines()) <= 500, file
