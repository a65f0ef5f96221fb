"""Numbers outside of a model, however its code reaches them: steps take them as they are now."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import revfx


PACKAGE = {
    "__init__": "from outside_pkg import config, helpers",
    "config": "SCALE, OTHER = 1.0, 1.0",
    "helpers": """
        SCALE = 1.0
        def scale(): return SCALE
        class Meter:
            def get(self): return scale()
            def named(self): return self.get()
        METER = Meter()
    """,
    "models": """
        import torch
        import outside_pkg
        from outside_pkg import helpers as h
        from outside_pkg.helpers import METER, Meter, scale
        from torch import nn

        SCALE = 1.0
        NAMES = {"scale": lambda: SCALE}

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.fs = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
                self.meter = Meter()
            def forward(self, x):
                a, b = x.chunk(2, -1)
                for f in self.fs:
                    a, b = b + self.by() * torch.tanh(f(a)), a
                return torch.cat([a, b], -1)

        class Named(Net):
            def by(self): return SCALE
        class Dotted(Net):
            def by(self): return outside_pkg.config.SCALE
        class DottedTwice(Net):
            def by(self): return outside_pkg.config.OTHER * self.once()
            def once(self): return outside_pkg.config.SCALE
        class DottedFunction(Net):
            def by(self): return outside_pkg.helpers.scale()
        class Alias(Net):
            def by(self): return h.SCALE
        class Local(Net):
            def by(self):
                from outside_pkg.config import SCALE
                return SCALE
        class LocalModule(Net):
            def by(self):
                import outside_pkg.config as c
                return c.SCALE
        class Function(Net):
            def by(self): return scale()
        class Method(Net):
            def by(self): return METER.get()
        class Attribute(Net):
            def by(self): return self.meter.named()
        class Table(Net):
            def by(self): return NAMES["scale"]()
    """,
}
PLACES = {  # where the number lies that each of them reads
    "Named": "models", "Dotted": "config", "DottedTwice": "config", "DottedFunction": "helpers", "Alias": "helpers",
    "Local": "config", "LocalModule": "config", "Function": "helpers", "Method": "helpers", "Attribute": "helpers",
    "Table": "models",
}  # fmt: skip


@pytest.fixture
def package(tmp_path: Path) -> Iterator[str]:
    folder = tmp_path / "outside_pkg"
    folder.mkdir()
    for name, text in PACKAGE.items():
        (folder / f"{name}.py").write_text(textwrap.dedent(text))
    sys.path.insert(0, str(tmp_path))
    yield "outside_pkg"
    sys.path.remove(str(tmp_path))
    for name in [n for n in sys.modules if n.partition(".")[0] == "outside_pkg"]:
        del sys.modules[name]


@pytest.mark.usefixtures("fp64")
@pytest.mark.parametrize("name", PLACES)
def test_a_number_that_changes_is_seen(package: str, name: str) -> None:
    models: Any = __import__(f"{package}.models", fromlist=["models"])
    torch.manual_seed(0)
    plain: Any = getattr(models, name)()
    model: Any = revfx.convert(plain)
    x = torch.randn(5, 8)
    for scale in (1.0, 3.0):
        vars(sys.modules[f"{package}.{PLACES[name]}"])["SCALE"] = scale
        expected = torch.autograd.grad(plain(x).sin().sum(), list(plain.parameters()))
        found = torch.autograd.grad(model(x).sin().sum(), list(model.parameters()))
        torch.testing.assert_close(found, expected)
    assert [len(p.regions) for p in model.revfx.plans] == [1, 1]


def test_a_forward_that_is_replaced_in_its_class_is_seen(package: str) -> None:
    models: Any = __import__(f"{package}.models", fromlist=["models"])
    model: Any = revfx.convert(models.Named())
    x = torch.randn(5, 8)
    before = model(x)
    models.Named.forward = lambda self, x: -models.Net.forward(self, x)
    assert torch.equal(model(x), -before)


@pytest.mark.usefixtures("fp64")
@pytest.mark.parametrize("hung", ["tuple", "table", "object"])
def test_a_number_of_a_module_that_is_not_registered_is_seen(package: str, hung: str) -> None:
    models: Any = __import__(f"{package}.models", fromlist=["models"])
    parent = torch.nn.Module()
    by = {"tuple": lambda self: self.up[0].n, "table": lambda self: self.up.n, "object": lambda self: self.up.it.n}
    plain: Any = type("Child", (models.Net,), {"by": by[hung]})()
    vars(plain)["up"] = {"tuple": (parent,), "table": parent, "object": SimpleNamespace(it=parent)}[hung]
    model: Any = revfx.convert(plain)
    x = torch.randn(5, 8)
    for n in (1.0, 3.0):
        vars(parent)["n"] = n
        assert torch.equal(model(x), plain(x))
    assert [len(p.regions) for p in model.revfx.plans] == [1, 1]
