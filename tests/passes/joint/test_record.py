"""What is recorded into a graph is spelled in operations that a compiler has lowerings for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from revfx.passes.joint.record import Recorder


COMPOSITE = {torch.ops.aten.flatten.using_ints, torch.ops.aten.unflatten.int, torch.ops.aten.to.dtype}


@pytest.mark.parametrize(
    "by",
    [
        lambda t: torch.linalg.vector_norm(t.reshape(1)),
        lambda t: t.masked_fill(t > 0, 1),
        lambda t: t.flatten().unflatten(0, (1, 1)).to(torch.float64),
    ],
)
def test_what_decompositions_call_is_taken_apart(by: Callable[[Tensor], Tensor]) -> None:
    """Inductor runs what it knows no lowering for by itself, and requires that results be aligned as its buffers are:
    a view of one element (`flatten`, of what lies at an odd place) raised.
    """
    x = torch.randn(1, 1)
    traced = make_fx(lambda t: t * 2, tracing_mode="fake")(x)
    (output,) = traced.graph.find_nodes(op="output")
    (made,) = output.all_input_nodes
    with traced.graph.inserting_before(output):
        output.args = (Recorder(traced.graph, select_decomp_table()).record(by, [made], None, made),)
    traced.recompile()
    assert torch.equal(traced(x), by(x * 2))
    assert COMPOSITE.isdisjoint(n.target for n in traced.graph.nodes)
