"""What the tests of the compiled path share: fixtures, and comparisons of compiled steps with plain ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from helpers import DEEP, TOLERANCE, leaf, loss_of, relative_error
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from revfx.compiled.partitioner import reports
from revfx.passes.joint.rewrite import Report


BOTH = ("inductor", "aot_eager")
INNERS = BOTH if DEEP else ("aot_eager",)  # compiling C++ takes most of the time there is
ROWS, WIDTH = 6, 4  # of one stream
# Dynamo looks at `.grad` of inputs that are no leaves.
QUIET = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Every test of a file that imports this runs in fp64, with nothing compiled before."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.compiler.reset()
    yield
    torch.set_default_dtype(dtype)
    torch.compiler.reset()


def compiled(model: nn.Module, inner: str, **options: Any) -> Callable[..., Any]:
    """`model`, compiled by the backend revfx."""
    if inner == "inductor":
        options = {"cpp.simdlen": 1, **options}  # which compiles fast
    return torch.compile(model, backend="revfx", options={"inner": inner, **options})


def steps(call: Callable[..., Any], module: nn.Module, inputs: Sequence[Tensor]) -> tuple[list[Tensor], list[Any]]:
    """What two steps give and leave: outputs, inputs, buffers and the random state; and all gradients."""
    torch.manual_seed(0)
    values, gradients = list[Tensor](), list[Any]()
    for _ in range(2):
        leaves = [t.detach().clone().requires_grad_(t.requires_grad) for t in inputs]
        outputs = pytree.tree_leaves(call(*leaves))
        loss_of(y for y in outputs if y.requires_grad).backward()
        values += [t.detach().clone() for t in (*outputs, *leaves, *module.buffers())]
        gradients += [t.grad for t in (*leaves, *module.parameters())]
        module.zero_grad()
    return [*values, torch.get_rng_state()], gradients


def check(model: nn.Module, inner: str, *inputs: Tensor) -> Report:
    """What was found in the compiled model, two steps of which are as two steps of the plain one."""
    inputs = inputs or (leaf(ROWS, 2 * WIDTH),)
    plain = copy.deepcopy(model)
    with reports() as found:
        got, gradients = steps(compiled(model, inner), model, inputs)
    expected, theirs = steps(plain, plain, inputs)
    if inner == "aot_eager":
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        if not same(gradients, theirs):  # torch's own compiler adds up what comes from several outputs in another order
            theirs = steps(torch.compile(plain, backend="aot_eager"), plain, inputs)[1]
            assert same(gradients, theirs)
    assert relative_error(got, expected) < TOLERANCE
    assert relative_error(gradients, theirs) < TOLERANCE
    assert len(found) <= 1
    return found[0] if found else Report((), ())


def same(some: Sequence[Tensor | None], others: Sequence[Tensor | None]) -> bool:
    """Whether tensors are others, bit for bit."""
    return all(
        a is b is None or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip(some, others, strict=True)
    )


def inverted(report: Report) -> int:
    """How many steps are inverted."""
    return sum(region.inverted for region in report.regions)
