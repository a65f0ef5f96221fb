"""What is set for the whole process, and otherwise in the forward than in the backward; what a re-run did otherwise."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers import WAYS, block, both, fp64 as fp64, leaf, lines, loss_of, mlp, relative_error, unseen
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from revfx import RevfxError
from revfx.ambient import settings
from revfx.checks import changed


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*self.qkv(x)[:, None].chunk(3, -1))[:, 0]


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * torch.tensor([0.1] * 4)


@contextmanager
def single() -> Generator[None]:
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float64)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("make", "around"), [(Attention, lambda: sdpa_kernel(SDPBackend.MATH)), (Scaled, single)], ids=["sdpa", "dtype"]
)
def test_settings_of_the_forward_hold_where_it_is_run_again(
    way: str, make: Callable[[], nn.Module], around: Callable[[], Any], fp64: None
) -> None:
    fs, gs = (nn.ModuleList(make() for _ in range(3)) for _ in range(2))
    x = [leaf(2, 5, 4), leaf(2, 5, 4)]
    wanted = [*x, *both(fs, gs).parameters()]

    def step(call: Callable[..., Any], inside: bool) -> Any:
        if inside:
            with around():
                loss = loss_of(call(*x))
            return torch.autograd.grad(loss, wanted)
        loss = loss_of(call(*x))
        before = settings()
        with around():
            there = settings()
            found = torch.autograd.grad(loss, wanted)
            assert settings() == there != before, "they are put back"
        return found

    for inside in (True, False):
        assert relative_error(step(block(way, fs, gs), inside), step(lines(fs, gs), inside)) < 1e-9


@pytest.mark.parametrize("way", WAYS)
def test_message_says_what_was_saved_otherwise(way: str, fp64: None) -> None:
    narrow = unseen()
    fs, gs = (
        [lambda x: (x.to(torch.float32 if narrow.values else x.dtype).exp() * 0.1).to(x.dtype)] * 3,
        [mlp() for _ in range(3)],
    )
    loss = loss_of(block(way, fs, gs)(leaf(5, 4), leaf(5, 4)))
    narrow.values.append(True)
    with pytest.raises(
        RevfxError, match=r"of \d+ saved, number 1 was torch.float64\[5, 4\].* is torch.float32\[5, 4\]"
    ):
        loss.backward()


def test_first_change_is_told() -> None:
    saved, other = [((2, 3), torch.float32), ((4,), torch.int64)], [((2, 3), torch.float32), ((5,), torch.int64)]
    assert changed(saved, saved, [(2,)], [(2,)]) is None
    assert changed(saved, saved[:1], [(2,)], [(2,)]) == "2 saved in the forward, 1 now"
    text = "of 2 saved, number 2 was torch.int64[4] in the forward and is torch.int64[5] now"
    assert changed(saved, other, [(2,)], [(2,)]) == text
    assert changed(saved, saved, [(2,)], [(3,)]) == "it returned the shape [2] in the forward and [3] now"
