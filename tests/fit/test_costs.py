"""Costs of operators, and what is known of their results."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from fit_models import Residual, branch, fit_of, planned, quick_search as quick_search
from torch import Tensor, nn

from revfx.fit.costs import sizes_depend_on_data


class Taking(Residual):
    """Layers, the rows that a function takes of their result, and rows of a table."""

    def __init__(self, take: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(*(branch() for _ in range(4)))
        self.take, self.table = take, nn.Parameter(torch.randn(10, 64))

    def forward(self, x: Tensor, numbers: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.take(super().forward(x + self.table[numbers]), numbers).tanh()


@pytest.mark.parametrize(
    ("take", "expected"),
    [
        pytest.param(lambda x, numbers: x, False, id="numbers"),
        pytest.param(lambda x, numbers: x[:, None].expand(-1, 2, -1)[numbers, numbers % 2], False, id="pairs"),
        pytest.param(lambda x, numbers: x[numbers > 3], True, id="mask"),
        pytest.param(lambda x, numbers: x[(numbers > 3).nonzero().squeeze(1)], True, id="nonzero"),
        pytest.param(lambda x, numbers: x[numbers.unique()], True, id="unique"),
        pytest.param(lambda x, numbers: x.repeat_interleave(numbers, 0), True, id="repeats"),
    ],
)
def test_indexing_has_sizes_that_depend_on_data_with_masks_alone(
    take: Callable[[Tensor, Tensor], Tensor], expected: bool
) -> None:
    model = planned(Taking(take), (torch.randn(64, 64), torch.arange(64) % 10), memory=0.8)
    (kind,) = fit_of(model).kinds.values()
    assert sizes_depend_on_data(kind.chosen.plan.needs.tape) is expected
