"""`drift` measures what the backward would read, and says so in a table and a picture."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import ConvBN, Dropout, Momentum, images

import revfx
from revfx.errors import RevfxError
from revfx.testing import drift


WIDTH = 32


class Chain(nn.Module):
    """Couplings that keep the size of what they are given."""

    def __init__(self, depth: int, exact: bool = False) -> None:
        super().__init__()
        self.block = revfx.RevBlock(lambda: mlp(), lambda: mlp(), depth, exact=exact)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self.block(*x.chunk(2, -1)), -1)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH // 2, 64), nn.Tanh(), nn.Linear(64, WIDTH // 2))


def test_errors_grow_from_the_last_step_to_the_first_and_are_those_of_the_backward() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, WIDTH)
    found = drift(Chain(30), x)
    errors = [s.error for s in found.steps if not s.kept]
    assert len(errors) == 2 * 59 - 1, "two values of every cut but the first, which is kept, and one of the second too"
    assert 0 < max(errors[:4]) < 5e-7 < found.worst < 1e-4
    assert found.worst == max(errors)
    numbers = [s.number for s in found.steps]
    assert numbers == sorted(numbers, reverse=True)


def test_the_dtype_decides() -> None:
    torch.manual_seed(0)
    chain, x = Chain(8), torch.randn(64, WIDTH)
    double = drift(chain.double(), x.double()).worst
    half = drift(chain.bfloat16(), x.bfloat16()).worst
    assert double < 1e-14 and 1e-3 < half < 0.5


def test_kept_cuts_start_afresh() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, WIDTH)
    bare, anchored = (drift(revfx.convert(Momentum(12), exact=False, anchor_every=every), x) for every in (None, 1))
    assert bare.worst > 0.0
    assert anchored.worst == 0.0 and sum(s.kept for s in anchored.steps) > len(anchored.steps) / 2


def test_gradients_are_compared_with_plain_ones_and_with_double_precision() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, WIDTH, requires_grad=True)
    model = Chain(8)
    found = drift(model, x, gradients=True)
    assert {g.name for g in found.gradients} == {"input 0", *(n for n, _ in model.named_parameters())}
    assert all(g.error < 1e-4 and 0 < g.plain_to_fp64 < 1e-4 and 0 < g.to_fp64 < 1e-4 for g in found.gradients)
    assert sum(g.error > 0 for g in found.gradients) > len(found.gradients) / 2
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_codes_correct_is_off_by_nothing(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    found = drift(Chain(8, exact=True).to(dtype), torch.randn(64, WIDTH).to(dtype), gradients=dtype != torch.bfloat16)
    assert found.worst == 0.0 and not all(s.kept for s in found.steps)
    assert all(g.error == 0.0 for g in found.gradients)


def test_nothing_is_left_behind() -> None:
    model, (x,) = revfx.convert(ConvBN(3)), images(4)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    drift(model, x, gradients=True)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_masks_are_drawn_again_alike() -> None:
    assert drift(revfx.convert(Dropout(6)), torch.randn(64, WIDTH)).worst < 1e-5


def test_a_drift_that_a_backward_would_refuse_is_measured() -> None:
    torch.manual_seed(0)
    chain = Chain(20)
    for p in chain.parameters():
        p.data.mul_(8)
    assert drift(chain, torch.randn(64, WIDTH)).worst > 0.01


def test_the_table_and_the_picture(tmp_path: Path) -> None:
    x = torch.randn(4, WIDTH, requires_grad=True)
    found = drift(revfx.convert(Momentum(3)), x, gradients=True)
    lines = str(found).splitlines()
    assert len(lines) == 2 + len(found.steps) + len(found.gradients)
    assert "kept" in lines[len(found.steps)] and "zoo.py:" in lines[1]
    found.plot(tmp_path / "drift.svg")
    assert (tmp_path / "drift.svg").read_text().count("<path") > 4


def test_without_matplotlib_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(RevfxError, match=r"pip install 'revfx\[viz\]'"):
        drift(Chain(2), torch.randn(4, WIDTH)).plot(tmp_path / "drift.svg")


def test_a_model_without_a_region_is_refused() -> None:
    with pytest.raises(RevfxError, match="`drift`: no reversible region was run by this Linear"):
        drift(nn.Linear(4, 4), torch.randn(2, 4))


# --- warnings of half precision
@pytest.mark.parametrize("options", [{"exact": False}, {"exact": False, "anchor_every": 8}, {"grid": 12}, {}])
def test_many_couplings_of_streams_in_half_precision_are_warned_of_once(options: dict[str, Any]) -> None:
    for depth, dtype in ((8, torch.bfloat16), (11, torch.bfloat16), (40, torch.float32)):
        model = revfx.convert(Chain(depth, exact=True).to(dtype), **options)
        block = revfx.RevBlock(nn.Tanh, nn.Tanh, depth, **options)
        warned = depth == 11 and options == {"exact": False}
        for call in (model, lambda x, block=block: block(*x.chunk(2, -1))):
            x = torch.randn(4, WIDTH, dtype=dtype, requires_grad=True)
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")
                call(x)
                call(x)
            texts = [str(w.message) for w in found if "couplings in a row" in str(w.message)]
            assert len(texts) == warned and all("have streams in torch.bfloat16" in t for t in texts)
