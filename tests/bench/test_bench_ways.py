"""Every contender of the bench trains the same model: its gradients are plain autograd's."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from revfx.bench.models import MODELS, BenchModel
from revfx.bench.ways import WAYS, Way, compiled, why_not
from revfx.testing import measure_memory, relative_error


BATCH, DEPTH = 4, 3
models = pytest.mark.parametrize("bench", MODELS.values(), ids=list(MODELS))


def gradients(bench: BenchModel, way: Way, dtype: torch.dtype = torch.float64) -> dict[str, Tensor | None]:
    """By name, what one step leaves in the model's parameters."""
    model = bench.make(DEPTH).to(dtype)
    inputs = tuple(t.to(dtype) if t.is_floating_point() else t for t in bench.inputs(BATCH))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the libraries use what torch has deprecated
        bench.loss(way.build(bench, model, inputs)(*inputs)).backward()
    return {name: p.grad for name, p in model.named_parameters()}


@models
@pytest.mark.parametrize("name", [n for n, w in WAYS.items() if not w.compiled and n != "plain"])
def test_gradients_are_plain_ones(name: str, bench: BenchModel) -> None:
    way = WAYS[name]
    if way.library:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pytest.importorskip(way.library)
    if bench.otherwise and way.additive:
        assert bench.otherwise in (why_not(way, bench) or "")
        return
    assert why_not(way, bench) is None
    want = gradients(bench, WAYS["plain"])
    got = gradients(bench, way)
    assert list(got) == list(want)
    for parameter, w in want.items():
        g = got[parameter]
        assert g is not None and w is not None and relative_error(g, w) < 1e-9, parameter


def test_the_backend_over_eager_kernels_keeps_less_and_has_plain_gradients() -> None:
    bench = MODELS["mlp"]
    want = gradients(bench, WAYS["plain"], torch.float32)
    got = gradients(bench, WAYS["backend-eager"], torch.float32)
    assert all(g is not None and w is not None and relative_error(g, w) < 1e-5 for g, w in zip_values(got, want))
    kept: dict[str, int] = {}
    for name in ("plain", "backend-eager"):
        model, inputs = bench.make(DEPTH), bench.inputs(64)
        call = WAYS[name].build(bench, model, inputs)
        kept[name] = measure_memory(lambda c=call, x=inputs: bench.loss(c(*x))).kept
    assert kept["backend-eager"] < kept["plain"] / 4


def zip_values(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[Any, Any]]:
    """Values of the same names."""
    return [(a[name], b[name]) for name in b]


def test_what_one_door_compiled_is_not_used_by_another() -> None:
    """Nor does it teach another that sizes change."""
    compilations: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        compilations.append(gm)
        return gm.forward

    model = MODELS["mlp"].make(1)
    for batch in (3, 3, 4):
        compiled(model, backend=backend)(*MODELS["mlp"].inputs(batch))
    assert len(compilations) == 3
    inputs = [n.meta["example_value"] for gm in compilations for n in gm.graph.nodes if n.op == "placeholder"]
    assert inputs and all(isinstance(t, Tensor) and isinstance(t.shape[0], int) for t in inputs)


def test_a_library_that_is_missing_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "revlib", None)
    assert why_not(WAYS["revlib"], MODELS["mlp"]) == "not installed: pip install 'revfx[bench]'"
    assert why_not(WAYS["convert"], MODELS["mlp"]) is None
