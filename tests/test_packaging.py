"""What is installed, what it imports, and in which direction."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import revfx
import revfx.passes.regions


PUBLIC = {
    "convert", "rev_block", "RevBlock", "register_inverse", "testing", "ReversiblePartitioner", "RevfxError",
    "NotReversibleError",
}  # fmt: skip
PRIVATE = ("torch._C", "torch._subclasses", "torch._functorch", "torch._dynamo", "torch._inductor", "functorch")
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
    assert all(hasattr(revfx, name) for name in PUBLIC)
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


def test_private_torch_api_is_used_in_three_modules() -> None:
    users = {
        f"{package}.{file.stem}"
        for package in ("revfx", "revfx.passes")
        for file in _files(package)
        if any(m.startswith(PRIVATE) for m in _imports(file)) or re.search(r"torch\._(C|ops|dynamo)", file.read_text())
    }
    assert users == {"revfx._torch", "revfx._compile", "revfx.passes._torch"}


def test_the_compiler_is_imported_when_it_is_used() -> None:
    """It takes a second or more, and most programs that import revfx never compile."""
    names = _run(
        "import sys, torch, revfx, revfx.testing",
        "print(*[m for m in sys.modules if m.startswith(('torch._dynamo', 'torch._inductor', 'functorch'))])",
        "revfx.ReversiblePartitioner()",
        "print('torch._inductor.compile_fx' in sys.modules)",
    )
    assert names == ["", "True"]


def test_torch_finds_the_backend_without_an_import_of_revfx() -> None:
    printed = _run(
        "import sys, torch, torch._dynamo",
        "torch.set_num_threads(1)",
        "print(*['revfx' in m.list_backends() for m in (torch.compiler, torch._dynamo)], 'revfx' in sys.modules)",
        "x = torch.randn(5, requires_grad=True)",
        "y = torch.compile(lambda x: x.sin() + 1, backend='revfx', options={'inner': 'aot_eager'})(x)",
        "y.sum().backward()",
        "print(torch.allclose(y, x.sin() + 1), torch.allclose(x.grad, x.cos()), 'revfx.backend' in sys.modules)",
    )
    assert printed == ["True True False", "True True True"]


def _run(*lines: str) -> list[str]:
    """What a program prints in a process of its own."""
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_passes_are_one_package_and_types_are_installed() -> None:
    assert "passes" not in sys.modules
    assert revfx.passes.regions.__name__ == "revfx.passes.regions"
    assert (Path(revfx.__file__).parent / "py.typed").exists()


def test_no_file_is_longer_than_500_lines() -> None:
    for file in _files("revfx") + _files("revfx.passes") + sorted(Path(__file__).parent.glob("*.py")):
        assert len(file.read_text().splitlines()) <= 500, file
