"""The native watcher: learning natively, the choice of a watcher, and the build of the extension."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from watching import ROWS, WIDTH, Layer, learn

from revfx.engine import native
from revfx.engine.learn import Learning
from revfx.engine.native import NativeMode, NativeWatching, learner, watcher
from revfx.engine.plan import Plan
from revfx.engine.watch import Watching
from revfx.errors import RevfxError


NATIVE: Any = native  # with its private parts


@pytest.fixture(autouse=True, scope="module")
def built() -> None:
    if watcher() is Watching:
        pytest.skip("there is no compiler for the native watcher")


@pytest.fixture
def x() -> Tensor:
    return torch.randn(ROWS, 2 * WIDTH)


# --- learning
class Names(TorchDispatchMode):
    """Note the names of operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_learning_does_not_change_the_operators() -> None:
    layer, x = nn.Linear(4, 2), torch.randn(2, 3, 4).transpose(0, 1)
    names: list[list[str]] = []
    for kind in (learner(Names), Names):
        with kind() as seen:
            layer(x)
        names.append(seen.names)
    assert names[0][-1] == "aten.add_.Tensor" and names[1][-1] == "aten.add.Tensor"
    assert names[0][:-1] == names[1][:-1]
    assert issubclass(learner(Names), NativeMode) and learner(Names) is learner(Names)
    assert learner(Names, python=True) is Names


def test_handlers_have_the_arguments_that_dispatch_modes_have() -> None:
    calls: list[list[Any]] = []

    class Arguments(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            calls[-1].append((func, pytree.tree_map_only(Tensor, lambda t: t.shape, (args, kwargs))))
            return func(*args, **kwargs)

    x = torch.randn(4, 4)
    for mode in (Arguments, learner(Arguments)):
        calls.append([])
        with mode():
            y = (x * 2 + 1.5) * True
            torch.empty_like(y, dtype=torch.float64, memory_format=torch.contiguous_format)
            torch.zeros(3, device="cpu", layout=torch.strided).to(torch.int64)
            torch.cat(y.split([1, 3]), 1 - 1)[[0, 2]].sum(-1, keepdim=True)
            torch.add(x, y, alpha=2).clamp(None, 1.0)
            torch.rand(2, generator=torch.default_generator).pow(1j)
            F.layer_norm(x, [4]).std([0, 1], correction=0)
    assert calls[0] == calls[1]
    assert len(calls[0]) > 15


def test_higher_order_operators_run(x: Tensor) -> None:
    layer = nn.Linear(2 * WIDTH, 2)

    def function(m: Layer, x: Tensor) -> Tensor:
        then: Any = torch.cond
        return then(x.shape[0] > 3, lambda z: layer(z).tanh(), lambda z: layer(z), (x,))

    model = Layer(function)
    plan = learn(model, x, False, 100)
    with NativeWatching(plan) as watching:
        out = model(x)
    assert torch.equal(out, layer(x).tanh())
    assert watching.forward.count == 1


def test_compiled_functions_run(x: Tensor) -> None:
    layer = nn.Linear(2 * WIDTH, 2)
    compiled: Any = torch.compile(lambda x: (layer(x) + 1).tanh(), backend="aot_eager")
    expected = (layer(x) + 1).tanh()
    for _ in range(2):
        with NativeWatching(Plan()):
            assert torch.equal(compiled(x), expected)


# --- the choice
@pytest.mark.parametrize(("choice", "kind"), [("", NativeWatching), ("native", NativeWatching), ("python", Watching)])
def test_the_environment_chooses(choice: str, kind: type[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REVFX_WATCH", choice)
    assert watcher() is kind
    assert watcher(python=True) is Watching
    assert issubclass(learner(Learning), NativeMode) == (kind is NativeWatching)


def test_an_unknown_choice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REVFX_WATCH", "fast")
    with pytest.raises(RevfxError, match=r"REVFX_WATCH is 'fast'.*Set it to `native` or `python`"):
        watcher()


def fresh(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Have the extension be built again, in another folder."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(folder))
    monkeypatch.setattr(native, "_library", NATIVE._Library())


@pytest.mark.parametrize("variable", ["CXX", "PATH"])
def test_without_a_compiler_the_watcher_is_in_python(
    variable: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fresh(monkeypatch, tmp_path)
    monkeypatch.setenv(variable, str(tmp_path / "nothing"))
    with caplog.at_level(logging.WARNING, "revfx"):
        assert watcher() is Watching and watcher() is Watching
    assert learner(Names) is Names
    (record,) = caplog.records
    assert "there is no `" in record.getMessage() and "Install a C++ compiler" in record.getMessage()
    monkeypatch.setenv("REVFX_WATCH", "native")
    with pytest.raises(RevfxError, match=r"there is no `.*Install a C\+\+ compiler"):
        watcher()


@pytest.mark.parametrize("is_terminal", [False, True])
def test_the_error_of_a_compiler_is_the_reason(
    is_terminal: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compiler = tmp_path / "compiler"
    lines = "#!/bin/sh", "test $1 = --version && exit", "echo 'watch.cpp:1:1: error: nothing works' >&2", "exit 1"
    compiler.write_text("\n".join(lines))
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    fresh(monkeypatch, tmp_path)
    library: Path = NATIVE._library_path()
    library.parent.mkdir()
    library.write_bytes(b"a build that was cut off")
    (library.parent / "lock").touch()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    assert watcher() is Watching
    assert ("revfx builds its watcher" in capsys.readouterr().err) == is_terminal
    assert NATIVE._library.reason == "watch.cpp:1:1: error: nothing works"
    assert not library.exists()


def test_a_key_that_is_taken_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    module = NATIVE._library.load()
    monkeypatch.setattr(native, "_library", NATIVE._Library())
    monkeypatch.setattr(native, "_built", lambda: module)  # it has registered its fallback already
    assert watcher() is Watching
    assert NATIVE._library.reason == "the dispatch key Fake is taken"
