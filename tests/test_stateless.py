"""What code of the user's is proven to leave everything as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import batch_norm, gelu
from torch.nn.init import zeros_

from revfx.stateless import leaves_nothing


counts: list[int] = []
OWN = ("linear", "norm", "scale", "buffer", "heads", "training")


def gate(x: Tensor) -> Tensor:
    return x.sigmoid() * 2


def noting(x: Tensor) -> Tensor:
    counts.append(1)
    return x


class Base(nn.Module):
    def twice(self, x: Tensor) -> Tensor:
        return x * 2

    def count(self, x: Tensor) -> Tensor:
        self.scale = 2.0
        return x

    @property
    def width(self) -> int:
        return int(self.heads) * 2  # type: ignore[arg-type]

    def __len__(self) -> int:
        return 3


def of(forward: Callable[..., Any], **members: Any) -> type[nn.Module]:
    return type("Made", (Base,), {"forward": forward, **members})


def attention(self: Any, x: Tensor) -> Tensor:
    b, t, c = x.shape
    q, k, v = self.linear(x).view(b, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, c)


def branching(self: Any, x: Tensor, side: Any) -> Tensor:
    if self.training and len(side) > 1:
        with torch.no_grad():
            x = x.clone()
    return sum(part(x) for part in self.linear) + max(side) + gate(x)


def in_place(self: Any, x: Tensor) -> Tensor:
    self.buffer.mul_(0.5)
    return x


def augmented(self: Any, x: Tensor) -> Tensor:
    buffer = self.buffer
    buffer += 1
    return x


def entry(self: Any, x: Tensor) -> Tensor:
    self.buffer[0] = 1.0
    return x


def global_name(self: Any, x: Tensor) -> Tensor:
    global counts
    counts = []
    return x


@pytest.mark.parametrize(
    "forward, expected",
    [
        (lambda self, x: self.twice(x) + self.norm(x) * self.scale, True),
        (lambda self, x: torch.tanh(F.gelu(self.linear(x))).chunk(2, -1)[0] * self.width, True),
        (attention, True),
        (branching, True),
        (lambda self, x: gate(x), True),
        (lambda self, x: noting(x), False),
        (lambda self, x: self.count(x), False),
        (lambda self, x: self.other(x), False),
        (lambda self, x: self.seen.append(1), False),
        (lambda self, x: F.batch_norm(x, None, None, training=True), False),
        (lambda self, x: torch.add(x, 1, out=self.buffer), False),
        (lambda self, x: F.relu(x, inplace=True), False),
        (lambda self, x: x * next(self.buffer), False),
        (lambda self, x: print(x), False),
        (lambda self, x: zeros_(self.buffer), False),
        (lambda self, x: batch_norm(x, None, None, training=True), False),
        (lambda self, x: gelu(x), True),
        (lambda self, x: setattr(self, "scale", 1.0), False),
        (lambda self, x: torch.manual_seed(0), False),
        (in_place, False),
        (augmented, False),
        (entry, False),
        (global_name, False),
    ],
)
def test_what_is_proven_about_a_forward(forward: Callable[..., Any], expected: bool) -> None:
    assert leaves_nothing(of(forward), OWN) == expected


def test_what_is_known_of_attributes_goes_before_their_names() -> None:
    forward = lambda self, x: self.gelu(x)  # noqa: E731
    assert leaves_nothing(of(forward), OWN)
    assert not leaves_nothing(of(forward), OWN, ("gelu",))
    assert not leaves_nothing(of(forward, gelu=Base()), OWN)
    assert not leaves_nothing(of(forward, gelu=lambda self, x: self.count(x)), OWN)
    assert not leaves_nothing(of(lambda self, x: self.float(x), float=lambda self, x: self.count(x)), OWN)


def test_defaults_that_may_be_written_to_are_not_known() -> None:
    def forward(self: Any, x: Tensor, seen: Any = []) -> Tensor:  # noqa: B006
        return x * len(seen)

    assert not leaves_nothing(of(forward), OWN)


def test_a_class_that_changes_how_attributes_or_calls_are_found_is_not_known() -> None:
    plain = lambda self, x: self.linear(x)  # noqa: E731
    assert leaves_nothing(of(plain), OWN)
    for name in ("__call__", "__getattr__", "__getattribute__"):
        assert not leaves_nothing(of(plain, **{name: lambda self, *args: None}), OWN)


def test_a_forward_that_closes_over_something_is_not_known() -> None:
    seen: list[Any] = []

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.linear(x) * len(seen)

    assert not leaves_nothing(of(forward), OWN)
