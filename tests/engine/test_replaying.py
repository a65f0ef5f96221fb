"""Graphs of replays run alike natively and in Python."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from revfx.engine.native import native_library
from revfx.engine.replaying import item, python_runner, runner


aten: Any = torch.ops.aten
Run = Callable[[list[Any]], tuple[Any, ...]]


def graph_of(*kinds: str) -> tuple[fx.Graph, list[fx.Node]]:
    graph = fx.Graph()
    return graph, [graph.placeholder(f"{kind}_{i}") for i, kind in enumerate(kinds)]


def runners(graph: fx.Graph, *kinds: str) -> list[Run]:
    """The graph, run in Python and as it is by default."""
    graph.set_codegen(fx.graph._BoxedCodeGen())  # pyright: ignore[reportAttributeAccessIssue]
    graph.lint()
    return [python_runner(graph), runner(graph, kinds)]


@pytest.fixture(autouse=True)
def natively() -> None:
    if native_library() is None:
        pytest.skip("there is no native watcher")


def test_operators_with_lists_keywords_numbers_and_several_results() -> None:
    kinds = "slot", "slot", "number", "number"
    graph, (x, y, scale, shape) = graph_of(*kinds)
    call: Any = graph.call_function
    both = call(aten.cat.default, ([x, y], 1))
    normed = call(aten.native_layer_norm.default, (both, [8], None, None, 1e-5))
    first, mean = call(item, (normed, 0)), call(item, (normed, 1))
    scaled = call(aten.mul.Tensor, (first, scale))
    halved = call(aten.div.Tensor, (scaled, 2))
    cast = call(aten._to_copy.default, (halved,), {"dtype": torch.float64})
    chosen = call(aten.index.Tensor, (cast, [None, call(aten.argsort.default, (x,))]))
    viewed = call(aten.view.default, (first, shape))
    parts = call(aten.split.Tensor, (viewed, 2))
    graph.output((chosen, mean, call(item, (parts, 1)), x))
    x1, y1 = torch.randn(2, 3, 4)
    found = [run([x1, y1, 0.5, [4, 6]]) for run in runners(graph, *kinds)]
    for got, want in zip(found[1], found[0], strict=True):
        assert got.dtype == want.dtype and torch.equal(got, want)
    assert found[1][-1] is x1


def test_functions_of_python_take_and_give_any_objects() -> None:
    def halves(t: Tensor, options: Any, *, by: int, more: Tensor) -> Any:
        return {"sum": t + more, "by": by, **options}

    def summed(found: Any, others: list[Tensor]) -> Tensor:
        return found["sum"] * found["by"] + found["add"] + others[0]

    kinds = "slot", "code"
    graph, (x, options) = graph_of(*kinds)
    call: Any = graph.call_function
    doubled = call(aten.add.Tensor, (x, x), {"alpha": 3})
    found = call(halves, (doubled, options), {"by": 2, "more": x})
    graph.output((call(summed, (found, [x, doubled])),))
    t = torch.randn(5)
    results = [run([t, {"add": 7}])[0] for run in runners(graph, *kinds)]
    assert torch.equal(results[0], results[1]) and torch.equal(results[1], (t + 3 * t + t) * 2 + 7 + t)


def test_a_result_of_several_that_a_function_of_python_gives() -> None:
    def both(t: Tensor) -> tuple[Tensor, str]:
        return t + 1, "text"

    graph, (x,) = graph_of("slot")
    call: Any = graph.call_function
    found = call(both, (x,))
    graph.output((call(item, (found, 0)), call(item, (found, 1))))
    for run in runners(graph, "slot"):
        t, text = run([torch.ones(2)])
        assert torch.equal(t, torch.full((2,), 2.0)) and text == "text"


def test_inputs_and_values_go_once_nothing_reads_them() -> None:
    alive: list[list[bool]] = []
    seen: list[weakref.ref[Tensor]] = []

    def note(t: Tensor) -> Tensor:
        seen.append(weakref.ref(t))
        return t.clone()

    def look(t: Tensor) -> Tensor:
        alive.append([reference() is not None for reference in seen])
        return t.clone()

    graph, (x,) = graph_of("slot")
    call: Any = graph.call_function
    graph.output((call(look, (call(aten.neg.default, (call(note, (x,)),)),)),))
    for run in runners(graph, "slot"):
        seen.clear()
        inputs = [torch.randn(3)]
        run(inputs)
        assert inputs == [] and alive.pop() == [False]


def test_an_error_is_that_of_the_operator() -> None:
    graph, (x, y) = graph_of("slot", "slot")
    graph.output((graph.call_function(aten.mm.default, (x, y)),))
    texts = list[str]()
    for run in runners(graph, "slot", "slot"):
        with pytest.raises(RuntimeError) as raised:
            run([torch.ones(2, 3), torch.ones(2, 3)])
        texts.append(str(raised.value).splitlines()[0])
    assert texts[0] == texts[1]
