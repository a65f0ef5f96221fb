"""What is installed, what it imports, and in which direction."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import revfx
import revfx.passes.regions


def test_the_version_is_that_of_the_package() -> None:
    assert revfx.__version__ == importlib.metadata.version("revfx")


def test_an_import_brings_no_library_and_all_names() -> None:
    """They take a second together, and are imported at the first use of a name."""
    assert _run(
        "import sys, torch",
        "before = {*sys.modules}",
        "import revfx",
        "print(*sorted({m.partition('.')[0] for m in sys.modules.keys() - before}))",
        "print({*revfx.__all__} <= {*dir(revfx)})",
        "from revfx import *",
        "print(convert is revfx.convert, debug.__name__, testing.__name__, inverse.__name__)",
    ) == ["revfx", "True", "True revfx.debug revfx.testing inverse"]


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
        "print(torch.allclose(y, x.sin() + 1), torch.allclose(x.grad, x.cos()))",
        "print('revfx.compiled.backend' in sys.modules)",
    )
    assert printed == ["True True False", "True True", "True"]


def _run(*lines: str) -> list[str]:
    """What a program prints in a process of its own."""
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_passes_are_one_package_and_types_are_installed() -> None:
    assert "passes" not in sys.modules
    assert revfx.passes.regions.__name__ == "revfx.passes.regions"
    assert (Path(revfx.__file__).parent / "py.typed").exists()
