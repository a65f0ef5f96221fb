"""Flow libraries as they are: their losses compile to one graph, keep nothing per block, and train as they did."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from flows import BY_CONVERT, FLOWS, IRREVERSIBLE, Program
from helpers import TOLERANCE, deep_but, relative_error
from torch import Tensor, nn

import revfx
from revfx.compiled.partitioner import reports
from revfx.errors import Refusal
from revfx.passes.joint.rewrite import Report
from revfx.testing import measure_memory


SHALLOW, DEEP, ROWS = 3, int(os.environ.get("REVFX_DEEP", "5")), 1024
GROWTH = 0.05  # of what the same compiler grows by without revfx
EAGER: dict[str, Any] = {"backend": "revfx", "options": {"inner": "aot_eager"}}
DOORS: dict[str, dict[str, Any]] = {
    "inductor": {"backend": "revfx", "options": {"cpp.simdlen": 1}},
    "aot_eager": EAGER,
}
# What is stored without revfx: by inductor, and by plain autograd.
STOCK: dict[str, dict[str, Any] | None] = {"inductor": {"options": {"cpp.simdlen": 1}}, "aot_eager": None}
# Inductor takes half a minute for the four compilations of one flow: one of each library.
BY_INDUCTOR = ("FrEIA one-sided", "normflows affine, swap")
# Of these others have the same operations, and more.
LIKE_OTHERS = (
    *("FrEIA NICE", "FrEIA RNVP", "FrEIA GLOW", "FrEIA GIN", "normflows affine, swap", "normflows sigmoid, shuffle"),
    *("normflows sigmoid_inv, swap", "normflows class-conditional", "normflows channel and channel_inv"),
    *("FrEIA GLOW, images", "FrEIA conditional affine", "FrEIA i-RevNet sampling", "normflows constants"),
    "normflows additive, swap",
    "FrEIA GLOW, context",
    "normflows masked",
)
CASES = [pytest.param(name, "aot_eager", marks=pytest.mark.deep if name in LIKE_OTHERS else ()) for name in FLOWS] + [
    pytest.param(name, "inductor", marks=pytest.mark.deep) for name in BY_INDUCTOR
]

# What a message says of each, and the library's file that it points to.
MATRIX = "multiplies by a matrix that need not be invertible"
MAP = "is a linear map that need not be invertible"
REFUSED: dict[str, tuple[str, str, str]] = {
    "FrEIA all in one": ("mm", "all_in_one_block.py", MATRIX),
    "FrEIA all in one, soft": ("mm", "all_in_one_block.py", MATRIX),
    "FrEIA all in one, GIN": ("mm", "all_in_one_block.py", MATRIX),
    "FrEIA all in one, Householder": ("mm", "all_in_one_block.py", MATRIX),
    "FrEIA all in one, images": ("convolution", "all_in_one_block.py", MAP),
    "FrEIA fixed matrix": ("mm", "fixed_transforms.py", MATRIX),
    "FrEIA fixed 1x1 convolution": ("convolution", "fixed_transforms.py", MAP),
    "FrEIA i-RevNet sampling by convolution": ("convolution", "reshapes.py", MAP),
    "FrEIA Haar": ("convolution", "reshapes.py", MAP),
    "FrEIA Householder": ("mm", "orthogonal.py", MATRIX),
    "FrEIA sigmoid": ("exp", "fixed_transforms.py", "`exp` has no inverse rule"),
    "normflows LU": ("mm", "mixing.py", MATRIX),
    "normflows matrix": ("mm", "mixing.py", MATRIX),
    "normflows 1x1 convolution": ("convolution", "mixing.py", MAP),
    # the graph ends where the library asks for the value of a tensor, and what is left has no coupling in it
    "normflows checkerboard": ("index", "reshape.py", "can't be known to be a permutation"),
    "normflows Glow": ("convolution", "mixing.py", MAP),
}

OF_EACH_REASON = (
    *("FrEIA all in one", "FrEIA fixed 1x1 convolution", "FrEIA i-RevNet sampling by convolution", "FrEIA sigmoid"),
    *("normflows LU", "normflows checkerboard"),
)


# Codes make up for what a matrix, or a function that saturates, rounds.
CODED = ("FrEIA all in one", "FrEIA fixed 1x1 convolution", "FrEIA Haar", "normflows matrix", "normflows LU")
CODED_COMPILED = ("FrEIA fixed 1x1 convolution", "normflows LU")  # where the rules are those of `convert`
CODED_LIKE_OTHERS = (
    *("FrEIA all in one, soft", "FrEIA all in one, GIN", "FrEIA all in one, images", "FrEIA fixed matrix"),
    *("FrEIA i-RevNet sampling by convolution", "FrEIA Householder", "normflows 1x1 convolution"),
)


# Of what compiled graphs see the numbers of, and are not cut apart where Python asks for them.
BY_INDEX = ("nflows affine", "nflows LU")

OF_EACH_KIND = (
    *("normflows activation normalisation", "normflows LU", "normflows Glow, two scales", "nflows affine"),
    "nflows rational-quadratic",
)


@pytest.fixture(autouse=True)
def fresh(fp64: None) -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Measured:
    """A flow of some depth, compiled (if a `door` is given) and trained for two steps.

    `memory` is the peak of the second one less the gradients of the parameters, and `error` says how far the first
    one's gradients are from plain autograd's, relatively.
    """

    def __init__(self, program: Program, depth: int, door: dict[str, Any] | None, fullgraph: bool = True) -> None:
        torch.compiler.reset()
        torch.manual_seed(0)
        module, loss = program.build(depth)
        inputs = [x.requires_grad_() for x in program.inputs(ROWS)]
        with torch.no_grad():
            loss(*inputs)  # layers that start themselves from data have done so
        compiled = loss if door is None else torch.compile(loss, fullgraph=fullgraph, **door)
        parameters = [p for p in module.parameters() if p.requires_grad]
        with reports() as found:
            got = gradients(compiled(*inputs), inputs, module)
        self.reports: Sequence[Report] = found
        self.error = relative_error(got, gradients(loss(*inputs), inputs, module))
        self.memory = measure_memory(lambda: compiled(*inputs)).peak - sum(p.nbytes for p in parameters)

    @property
    def steps(self) -> int:
        """How many steps the regions of all graphs have."""
        return sum(region.steps for report in self.reports for region in report.regions)

    @property
    def refusals(self) -> list[Refusal]:
        """What was refused in any graph."""
        return [refusal for report in self.reports for refusal in report.refusals]


def gradients(loss: Tensor, inputs: Sequence[Tensor], module: nn.Module) -> Sequence[Tensor | None]:
    """The gradients of the inputs and of all parameters that are trained."""
    wanted = [*inputs, *(p for p in module.parameters() if p.requires_grad)]
    return torch.autograd.grad(loss, wanted, allow_unused=True)


@functools.cache
def stock_growth(name: str, inner: str) -> int:
    """Bytes by which the peak grows from the shallow flow to the deep one without revfx: so much for each block."""
    first, second = (Measured(FLOWS[name], depth, STOCK[inner]).memory for depth in (SHALLOW // 2, SHALLOW))
    return (second - first) * (DEEP - SHALLOW) // (SHALLOW - SHALLOW // 2)


@pytest.mark.parametrize(("name", "inner"), CASES)
def test_a_flow_keeps_nothing_per_block_and_has_the_plain_gradients(name: str, inner: str) -> None:
    shallow, deep = (Measured(FLOWS[name], depth, DOORS[inner]) for depth in (SHALLOW, DEEP))
    for measured, depth in ((shallow, SHALLOW), (deep, DEEP)):
        assert len(measured.reports) == 1, "the loss is one graph"
        assert measured.reports[0].regions, [str(r) for r in measured.refusals]
        assert measured.steps >= depth
        assert measured.error < TOLERANCE
    assert deep.steps - shallow.steps >= DEEP - SHALLOW
    assert deep.memory - shallow.memory < GROWTH * stock_growth(name, inner)


@pytest.mark.filterwarnings("ignore:torch.lu is deprecated:UserWarning")  # normflows calls it
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo, where a graph ends
@pytest.mark.parametrize("name", deep_but(OF_EACH_REASON, IRREVERSIBLE))
def test_what_can_not_be_inverted_is_refused_with_its_operation_and_place(name: str) -> None:
    op, file, reason = REFUSED[name]
    door = {**EAGER, "options": {"inner": "aot_eager", "exact": False}}  # by codes some of them can be inverted
    measured = Measured(IRREVERSIBLE[name], 2, door, fullgraph=False)
    said = [(r.op, Path(r.where.rpartition(":")[0]).name, r.detail) for r in measured.refusals]
    assert any((o, f) == (op, file) and reason in r for o, f, r in said), said
    assert measured.error < TOLERANCE


class Trained(nn.Module):
    """A flow and its loss as one module."""

    def __init__(self, flow: nn.Module, loss: Callable[..., Tensor]) -> None:
        super().__init__()
        self.flow, self.run = flow, loss

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.run(*inputs)


@pytest.mark.filterwarnings("ignore:torch.lu is deprecated:UserWarning")  # normflows calls it
@pytest.mark.parametrize(
    ("name", "way"),
    deep_but(
        [*((name, "convert") for name in CODED), *((name, "aot_eager") for name in CODED_COMPILED)],
        itertools.product((*CODED, *CODED_LIKE_OTHERS), ("convert", "aot_eager")),
    ),
)
def test_by_codes_linear_maps_keep_little_per_block_and_gradients_are_the_plain_ones(name: str, way: str) -> None:
    assert_lossless(IRREVERSIBLE[name], way)


@pytest.mark.filterwarnings("ignore:torch.lu is deprecated:UserWarning")
@pytest.mark.parametrize("name", deep_but(OF_EACH_KIND, BY_CONVERT))
def test_what_asks_buffers_or_writes_by_index_keeps_little_per_block(name: str) -> None:
    assert_lossless(BY_CONVERT[name], "convert")


@pytest.mark.parametrize("name", BY_INDEX)
def test_indices_in_buffers_are_seen_over_eager_kernels(name: str) -> None:
    assert_lossless(BY_CONVERT[name], "aot_eager")


def assert_lossless(program: Program, way: str) -> None:
    """Plain's gradients, bit for bit, and little of what plain keeps for each block; the first call sets layers up."""
    memory: list[list[int]] = []
    for depth in (SHALLOW, DEEP):
        torch.compiler.reset()
        torch.manual_seed(0)
        flow, loss = program.build(depth)
        inputs = [x.requires_grad_() for x in program.inputs(ROWS)]
        taken: Any = revfx.convert(Trained(flow, loss)) if way == "convert" else torch.compile(loss, **EAGER)
        taken(*inputs)
        for _ in range(2):
            got, want = gradients(taken(*inputs), inputs, flow), gradients(loss(*inputs), inputs, flow)
            assert all(g is w if g is None or w is None else torch.equal(g, w) for g, w in zip(got, want, strict=True))
        memory.append([measure_memory(functools.partial(step, *inputs)).kept for step in (taken, loss)])
    (ours, plain), (ours_deep, plain_deep) = memory
    assert ours_deep - ours < GROWTH * (plain_deep - plain)
