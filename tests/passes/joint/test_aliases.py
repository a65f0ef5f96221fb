"""What a compiled forward saves of inputs and outputs: writes to these before the backward raise, as in eager mode."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiled import INNERS, ROWS, WIDTH, check, compiled, fresh as fresh, inverted
from helpers import TOLERANCE, deep_but, leaf, mlps, relative_error
from torch import Tensor, fx, nn
from torch._dynamo import config as dynamo_config
from torch.multiprocessing.reductions import StorageWeakRef

from revfx.compiled import partitioner
from revfx.passes.joint import aliases
from revfx.passes.joint.forward import output_args
from revfx.passes.sizes import tensors_of


Taken = Callable[[Tensor], tuple[Tensor, ...]]


def parts(x: Tensor) -> tuple[Tensor, ...]:
    return x.split([WIDTH, WIDTH], -1)


def turned(x: Tensor) -> tuple[Tensor, ...]:
    h = x.view(-1, 2, WIDTH).transpose(0, 1)
    return h[0], h[1]


def rows(x: Tensor) -> tuple[Tensor, ...]:
    n = x.shape[0] // 2
    return x[:n, :WIDTH], x.view(2, n, 2 * WIDTH)[1, :, WIDTH:]


class Couplings(nn.Module):
    """Couplings of what is `taken` of the input, and what is `given` of the last streams."""

    def __init__(self, taken: Taken, given: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.f, self.g = mlps(2, WIDTH), mlps(2, WIDTH)
        self.taken, self.given = taken, given

    def forward(self, x: Tensor) -> Any:
        a, b = self.taken(x)
        for f, g in zip(self.f, self.g, strict=True):
            a = a + f(b)
            b = b + g(a)
        return self.given(a, b)


GIVEN: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "streams": lambda a, b: (a, b),
    "joined": lambda a, b: torch.cat([a, b], -1),
    "views": lambda a, b: (a.t(), b[:, 1:]),
}


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("taken", [parts, turned, rows])
@pytest.mark.parametrize("dynamic", deep_but((True,), (False, True)))
def test_nothing_is_saved_that_lies_in_an_input_or_output(
    taken: Taken, given: str, dynamic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[fx.Graph, fx.Graph, int]] = []

    def noted(forward: fx.Graph, backward: fx.Graph, num_outputs: int) -> None:
        aliases.save_bases(forward, backward, num_outputs)
        seen.append((forward, backward, num_outputs))

    monkeypatch.setattr(partitioner, "save_bases", noted)
    with dynamo_config.patch(assume_static_by_default=not dynamic):
        assert inverted(check(Couplings(taken, GIVEN[given]), "aot_eager"))
    for forward, backward, n in seen:
        outputs, saved = output_args(forward)[:n], output_args(forward)[n:]
        inputs = forward.find_nodes(op="placeholder")
        memory = {
            StorageWeakRef(t.untyped_storage()) for node in (*inputs, *outputs) for t in tensors_of(node.meta["val"])
        }
        inside = [s for s in saved if s not in inputs and s not in outputs]
        assert memory.isdisjoint(StorageWeakRef(t.untyped_storage()) for s in inside for t in tensors_of(s.meta["val"]))
        placeholders = [p.target for p in backward.find_nodes(op="placeholder")]
        assert {s.name for s in saved} == set(placeholders[: len(saved)])


@pytest.mark.parametrize("inner", deep_but(("aot_eager",), ("inductor", "aot_eager")))
@pytest.mark.parametrize("taken", [parts, turned] if len(INNERS) > 1 else [parts])
def test_an_input_that_is_written_to_before_the_backward_raises(taken: Taken, inner: str) -> None:
    x = leaf(ROWS, 2 * WIDTH)
    a, b = compiled(Couplings(taken, GIVEN["streams"]), inner)(x)
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (a.sum() + b.sum()).backward()


def test_so_it_does_in_a_graph_without_a_region() -> None:
    x, w = leaf(2, 3), leaf(3, 3)
    product = torch.compile(torch.matmul, backend="revfx", options={"cpp.simdlen": 1})(x, w)
    with torch.no_grad():
        x.mul_(10)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@pytest.mark.deep
@pytest.mark.parametrize("which", [0, 1])
def test_outputs_that_are_views_may_be_written_to_or_raise(which: int) -> None:
    assert_right_or_raises(Couplings(parts, GIVEN["views"]), lambda x, outputs: outputs[which])


class Passed(nn.Module):
    """Returns a part of its input, which a function reads, as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x.chunk(2, -1)
        return a + torch.tanh(self.f(b)), b


@pytest.mark.parametrize("which", ["x", "b"])
def test_a_part_of_an_input_that_is_returned_may_be_written_to_or_raises(which: str) -> None:
    assert_right_or_raises(Passed(), lambda x, outputs: x if which == "x" else outputs[1])


def assert_right_or_raises(model: nn.Module, written: Callable[[Tensor, Any], Tensor]) -> None:
    x = leaf(ROWS, 2 * WIDTH)
    plain, outputs = model(x), compiled(model, "inductor")(x)
    want = torch.autograd.grad(plain[0].sum() + plain[1].sum(), [x, *model.parameters()])
    loss = outputs[0].sum() + outputs[1].sum()
    with torch.no_grad():
        written(x, outputs).mul_(1.001)
    try:
        got = torch.autograd.grad(loss, [x, *model.parameters()])
    except RuntimeError as e:
        assert re.search("modified by an inplace operation|has been modified inplace", str(e)) is not None
    else:
        assert relative_error(got, want) < TOLERANCE
