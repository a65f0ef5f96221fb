"""Invertible linear maps, in every spelling: with codes they train as plainly, bit for bit, and keep little."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import kept_cuts, regions_of
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import revfx
from revfx import rules
from revfx.converted import conversion_of
from revfx.errors import RevfxWarning
from revfx.rules import linear
from revfx.testing import gradients


D, ROWS, LAYERS = 8, 64, 4
Map = Callable[[], nn.Module]


class By(nn.Module):
    """`forward(x)` is what `apply` makes of x and of a parameter, which starts as `start`."""

    def __init__(self, apply: Callable[[Tensor, Tensor], Tensor], start: Tensor) -> None:
        super().__init__()
        self.apply_to, self.w = apply, nn.Parameter(start)

    def forward(self, x: Tensor) -> Tensor:
        return self.apply_to(x, self.w)


def rotation(n: int = D) -> Tensor:
    return torch.linalg.qr(torch.randn(n, n))[0] + 0.05 * torch.randn(n, n)


def kernel(*size: int, groups: int = 1, channels: int = D) -> Tensor:
    """The weight of a convolution that takes its input apart."""
    n = channels // groups * torch.Size(size).numel()
    return torch.cat([rotation(n) for _ in range(groups)]).view(groups * n, channels // groups, *size)


def by(apply: Callable[[Tensor, Tensor], Tensor], start: Callable[[], Tensor] = rotation) -> Map:
    return lambda: By(apply, start())


def plu(x: Tensor, w: Tensor) -> Tensor:
    return x @ (w.tril(-1) + torch.eye(D)) @ (w.triu(1) + torch.diag(torch.exp(w.diagonal())))


def householder(x: Tensor, w: Tensor) -> Tensor:
    v = w[0]
    return x @ (torch.eye(D) - 2 * torch.outer(v, v) / (v @ v))


SECOND: Any = ([1], [1])
VECTORS: dict[str, Map] = {
    "nn.Linear": lambda: nn.Linear(D, D),
    "without a bias": lambda: nn.Linear(D, D, bias=False),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(D, D)),
    "linear": by(F.linear),
    "@": by(lambda x, w: x @ w),
    "matmul": by(torch.matmul),
    "mm": by(lambda x, w: x.mm(w)),
    "by names": by(lambda x, w: torch.mm(mat2=w, input=x)),
    "from the left": by(lambda x, w: (w @ x.t()).t()),
    "addmm": by(lambda x, w: torch.addmm(w[0], x, w)),
    "bmm": by(lambda x, w: torch.bmm(x.unsqueeze(0), w.unsqueeze(0)).squeeze(0)),
    "einsum": by(lambda x, w: torch.einsum("bi,oi->bo", x, w)),
    "einsum from the left": by(lambda x, w: torch.einsum("ij, ...j -> ...i", [w, x])),
    "tensordot": by(lambda x, w: torch.tensordot(x, w, 1)),
    "tensordot from the left": by(lambda x, w: torch.tensordot(w, x, SECOND).t()),
    "QR": by(lambda x, w: x @ torch.linalg.qr(w)[0]),
    "LU": by(plu),
    "Householder": by(householder),
    "exponential": by(lambda x, w: x @ torch.matrix_exp(w - w.t())),
}
IMAGES: dict[str, Map] = {
    "nn.Conv2d": lambda: nn.Conv2d(D, D, 1),
    "1x1": by(F.conv2d, lambda: kernel(1, 1)),
    "1x1 of a matrix": by(lambda x, w: F.conv2d(x, w[:, :, None, None])),
    "einsum of images": by(lambda x, w: torch.einsum("bchw,cd->bdhw", x, w)),
    "tensordot of images": by(lambda x, w: torch.tensordot(x, w, SECOND).movedim(-1, 1)),
    "groups": by(lambda x, w: F.conv2d(x, w, groups=2), lambda: kernel(1, 1, groups=2)),
    "down and up": by(
        lambda x, w: F.conv_transpose2d(F.conv2d(x, w, stride=2), 1.5 * w, stride=2), lambda: kernel(2, 2)
    ),
    "1d": by(lambda x, w: F.conv1d(x.flatten(2), w, stride=4).reshape(x.shape), lambda: kernel(4)),
    "3d": by(lambda x, w: F.conv3d(x.unsqueeze(2), w).squeeze(2), lambda: kernel(1, 1, 1)),
}


class Flow(nn.Module):
    """Linear maps with couplings in between."""

    def __init__(self, make: Map, f: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.maps = nn.ModuleList(make() for _ in range(LAYERS))
        self.f = nn.ModuleList(f() for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for to, f in zip(self.maps, self.f, strict=True):
            a, b = to(x).chunk(2, 1)
            x = torch.cat([a + f(b), b], 1)
        return x


def flow(name: str) -> tuple[Flow, Tensor]:
    if name in VECTORS:
        return Flow(VECTORS[name], lambda: nn.Sequential(nn.Linear(D // 2, D // 2), nn.Tanh())), torch.randn(ROWS, D)
    return Flow(IMAGES[name], lambda: nn.Conv2d(D // 2, D // 2, 3, padding=1)), torch.randn(4, D, 4, 4)


def equal(got: dict[str, Any], want: dict[str, Any]) -> bool:
    """Whether gradients are the same, bit for bit."""
    same = [
        g is w if w is None or g is None else torch.equal(g, w)
        for g, w in zip(got.values(), want.values(), strict=True)
    ]
    return got.keys() == want.keys() and all(same)


@pytest.mark.parametrize("name", [*VECTORS, *IMAGES])
def test_maps_are_inverted_and_gradients_are_the_plain_ones(name: str) -> None:
    model, x = flow(name)
    converted: Any = revfx.convert(copy.deepcopy(model))
    for _ in range(3):
        assert equal(gradients(converted, [x]), gradients(model, [x]))
    (region,) = regions_of(converted)
    assert sum(s.is_inverted for s in region.steps) >= 2 * LAYERS - 1, converted.revfx.program
    coded = conversion_of(converted).coded_bytes
    assert coded < kept_cuts(converted) * x.nbytes + x.nbytes * LAYERS / 2, "codes are smaller than what they stand for"


@pytest.mark.parametrize("name", ["nn.Linear", "LU", "nn.Conv2d", "down and up"])
def test_maps_are_inverted_over_eager_kernels(name: str) -> None:
    model, x = flow(name)
    want = gradients(torch.compile(copy.deepcopy(model), backend="aot_eager"), [x])
    torch.compiler.reset()
    compiled = torch.compile(copy.deepcopy(model), backend="revfx", options={"inner": "aot_eager", "strict": True})
    assert equal(gradients(compiled, [x]), want)


class Padded(nn.Conv1d):
    """A convolution that is no product by one block."""

    def __init__(self) -> None:
        super().__init__(1, 1, 3, padding=1)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.unsqueeze(1)).squeeze(1)


REFUSED: dict[str, Map] = {
    "not square": lambda: nn.Sequential(nn.Linear(D, 2 * D), nn.Linear(2 * D, D)),
    "computed from data": by(lambda x, w: x @ (w + x.mean())),
    "a stream times its own product": by(lambda x, w: x @ (x.t() @ x / 100)),
    "padded": Padded,
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore::revfx.errors.RevfxWarning")
def test_what_need_not_be_invertible_is_left_alone(name: str) -> None:
    model, x = Flow(REFUSED[name], lambda: nn.Linear(D // 2, D // 2)), torch.randn(ROWS, D)
    converted: Any = revfx.convert(copy.deepcopy(model))
    assert equal(gradients(converted, [x]), gradients(model, [x]))
    steps = [s for r in regions_of(converted) for s in r.steps]
    assert not any(f"({name})" in a.text for s in steps for a in s.arcs for name in ("linear", "matmul", "conv1d"))


@pytest.mark.parametrize("smallest", [0.0, 1e-30, 0.02])
def test_a_matrix_without_a_good_inverse_keeps_what_it_reads(smallest: float) -> None:
    model = Flow(lambda: nn.Linear(D, D), lambda: nn.Linear(D // 2, D // 2))
    with torch.no_grad():
        for m in model.maps:
            m.get_parameter("weight")[0] *= smallest
    x = torch.randn(ROWS, D)
    converted: Any = revfx.convert(copy.deepcopy(model))
    for _ in range(3):
        got, want = gradients(converted, [x]), gradients(model, [x])
        assert equal(got, want) and all(g.isfinite().all() for g in got.values() if g is not None)
    (region,) = regions_of(converted)
    planned = conversion_of(converted).planned
    assert region and planned is not None
    widths = [codec.width for kind in planned.kinds.values() for codec in kind.plan.codecs.values()]
    assert widths.count(None) >= LAYERS - 1 if smallest < 0.02 else None not in widths[1:]


@pytest.mark.filterwarnings("ignore::revfx.errors.RevfxWarning")
def test_a_square_matrix_at_the_end_of_a_deep_network_is_no_trouble() -> None:
    class Deep(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(1500):
                x = x.sin()
            return x @ (x.t() @ x)

    x = torch.randn(ROWS, D, requires_grad=True)
    got, want = (torch.autograd.grad(m(x).sum(), x)[0] for m in (revfx.convert(Deep()), Deep()))
    assert torch.equal(got, want)


def test_under_autocast_a_product_that_is_narrower_is_not_inverted() -> None:
    model, x = flow("nn.Linear")
    converted: Any = revfx.convert(copy.deepcopy(model))
    with torch.autocast("cpu", torch.bfloat16):
        assert equal(gradients(converted, [x]), gradients(model, [x]))


def test_the_inverse_is_made_once_in_a_step_and_anew_in_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Tensor] = []
    invert_matrix = linear.invert_matrix

    def counted(m: Tensor) -> Tensor:
        made.append(m)
        return invert_matrix(m)

    monkeypatch.setattr(linear, "invert_matrix", counted)
    model, x = flow("nn.Linear")
    converted: Any = revfx.convert(model)
    for _ in range(2):
        converted(x)  # which is learnt from, and proven
    for _ in range(3):
        made.clear()
        y = converted(x).square().mean()
        forward = len(made)
        y.backward()
        assert 0 < forward == len(made) <= LAYERS
        with torch.no_grad():
            for m in model.maps:
                m.get_parameter("weight").data.add_(
                    0.1
                )  # which counts no version, as a fused optimizer's step does not


@pytest.mark.parametrize("activation", [nn.Tanh, nn.Sigmoid, nn.LeakyReLU, nn.ELU, nn.SELU, nn.Softplus])
def test_modules_that_are_one_to_one_are_seen_through_beside_couplings(activation: type[nn.Module]) -> None:
    model = Flow(lambda: nn.Sequential(nn.Linear(D, D), activation()), lambda: nn.Linear(D // 2, D // 2))
    x = torch.randn(ROWS, D)
    converted: Any = revfx.convert(copy.deepcopy(model))
    assert equal(gradients(converted, [x]), gradients(model, [x]))
    (region,) = regions_of(converted)
    assert region.start <= 1 and sum(s.is_inverted for s in region.steps) >= 2 * LAYERS - 1


def test_without_a_coupling_they_are_left_alone() -> None:
    """As a network of such layers has no other activations than those that codes would have to make up for."""
    model = nn.Sequential(*(nn.Sequential(nn.Linear(D, D), nn.Tanh()) for _ in range(8)))
    converted: Any = revfx.convert(model)
    with pytest.warns(RevfxWarning, match="nothing reversible"):
        converted(torch.randn(ROWS, D))
    assert not converted.revfx.plans


def test_every_operator_has_a_rule() -> None:
    ops = [op for op, rule in rules.registered().items() if rule.__module__ == linear.__name__]
    assert {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.convolution.default} <= {*ops}
