"""Views of one allocation: whether they may share elements, against the elements themselves."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from revfx.engine.tape import View


SHAPES = [(2, 3, 4, 5), (6, 20), (120,), (4, 30), (5, 4, 6)]


def view(t: Tensor) -> View:
    return View(t.dtype, tuple(t.shape), t.stride(), int(t.storage_offset()))


def some_view(base: Tensor, rng: random.Random) -> Tensor:
    t = base.view(rng.choice(SHAPES))
    for _ in range(rng.randint(0, 3)):
        if not t.dim():
            break
        dim, way = rng.randrange(t.dim()), rng.randint(0, 4)
        size = t.shape[dim]
        if way == 0 and size > 1:
            start = rng.randrange(size)
            t = t.narrow(dim, start, rng.randint(1, size - start))
        elif way == 1:
            t = t.transpose(dim, rng.randrange(t.dim()))
        elif way == 2 and size > 1:
            t = t.movedim(dim, 0)[rng.randrange(2) :: 2].movedim(0, dim)
        elif way == 3 and size > 2:
            t = t.unfold(dim, 2, 1)
        elif way == 4 and t.dim() > 1:
            t = t.select(dim, rng.randrange(size))
    return t


def test_views_that_share_elements_are_never_said_to_be_apart() -> None:
    rng, base = random.Random(0), torch.arange(120)
    for _ in range(3000):
        a, b = some_view(base, rng), some_view(base, rng)
        if {*a.flatten().tolist()} & {*b.flatten().tolist()}:
            assert view(a).overlaps(view(b)), (a, b)


def test_slices_along_any_dimension_are_apart() -> None:
    t = torch.arange(120).view(2, 3, 4, 5)
    for dim in range(4):
        a, b = t.tensor_split([1], dim)
        assert not view(a).overlaps(view(b)) and view(a).overlaps(view(t))
        a, b = t.select(dim, 0), t.select(dim, 1)
        assert not view(a).overlaps(view(b)) and view(a).overlaps(view(a))
