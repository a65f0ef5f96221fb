"""What any operation of a compiled backward raises, those that regenerate activations among them, comes through."""

from __future__ import annotations

import copy
from typing import Any

import torch
from compiled import compiled, fresh as fresh
from faults import KINDS, Dispatched, around
from helpers import TOLERANCE, leaf, loss_of, relative_error
from torch import Tensor, nn
from ways import BUILD

from revfx.compiled.partitioner import reports


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh())


def test_what_raises_at_any_operation_of_a_compiled_backward_comes_through_and_the_next_step_works() -> None:
    model: Any = BUILD["plain"]([normed() for _ in range(3)], [normed() for _ in range(3)])
    plain, x = copy.deepcopy(model), leaf(6, 8)
    start = copy.deepcopy(model.state_dict())
    call = compiled(model, "aot_eager")

    def forward(m: nn.Module, run: Any) -> Tensor:
        m.load_state_dict(start)
        m.zero_grad()
        x.grad = None
        torch.manual_seed(1)
        return loss_of(run(x))

    def gradients(m: nn.Module, run: Any) -> list[Tensor | None]:
        forward(m, run).backward()
        return [x.grad, *(p.grad for p in m.parameters())]

    expected, end = gradients(plain, plain), torch.get_rng_state()
    with reports() as found:
        assert relative_error(gradients(model, call), expected) < TOLERANCE
    assert sum(region.inverted for region in found[0].regions) >= 4
    n = 1
    while True:
        loss, error, caught = forward(model, call), KINDS[n % len(KINDS)](n), None
        before, active = around(model), Dispatched(n, error)
        try:
            with active:
                loss.backward()
        except BaseException as e:
            caught = e
        if caught is None:
            assert active.count < n
            break
        assert caught is error and around(model) == before and torch.equal(torch.get_rng_state(), end), n
        assert all(torch.equal(a, b) for a, b in zip(model.buffers(), plain.buffers(), strict=True)), n
        assert relative_error(gradients(model, call), expected) < TOLERANCE
        n += 23
    assert n > 150
