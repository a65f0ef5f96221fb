# pyright: reportPrivateUsage=false
"""Counting kernels in the bench: launches, bytes and FLOPs, of operators and of whole steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bench.count import Card, Counts, Kernel, KernelLog, as_on_accelerators, count
from bench.measure import Sizes
from bench.models import MODELS, Task
from bench.ways import WAYS
from torch import Tensor, nn

from revfx.testing import measure_memory


@pytest.mark.parametrize(
    ("operation", "nbytes"),
    [
        (lambda x: x.t().detach()[:2].unsqueeze(0), []),
        (lambda x: torch.empty_like(x).resize_(2), []),
        (lambda x: x + x, [128 + 128]),
        (lambda x: x + x[:1].expand(4, 8), [128 + 32 + 128]),
        (lambda x: torch.zeros_like(x), [128]),
        (lambda x: torch.empty_like(x).copy_(x), [128 + 128]),
        (lambda x: torch.add(x, 1, out=torch.empty(4, 8)), [128 + 128]),
        (lambda x: x.clone().add_(x), [128 + 128, 2 * 128 + 128]),
        (lambda x: x.t().reshape(-1), [128 + 128]),
        (lambda x: x.sum().item(), [128 + 4, 4]),
    ],
)
def test_kernels_of_operators(operation: Callable[[Tensor], Any], nbytes: list[int]) -> None:
    x = torch.ones(4, 8)
    with KernelLog() as log:
        operation(x)
    assert [kernel.nbytes for kernel in log.kernels] == nbytes


def test_composite_operators_below_autograd_count_as_their_parts() -> None:
    x = torch.ones(4, 8)
    below_autograd: Any = torch._C._AutoDispatchBelowAutograd
    with KernelLog() as log, below_autograd():
        torch.nn.functional.linear(x, x)
        torch.nn.functional.silu(x)
    assert [kernel.name for kernel in log.kernels] == ["mm", "silu"]


def test_the_time_of_a_kernel_is_its_longest_part() -> None:
    card = Card(bandwidth=10, rate=100, launch=1)
    kernels = Kernel("", nbytes=50, flops=300), Kernel("", nbytes=10, flops=300), Kernel("", nbytes=5)
    assert [kernel.seconds(card) for kernel in kernels] == [5, 3, 1] and Counts(kernels).seconds(card) == 9


def test_counts_of_two_layers_are_those_by_hand() -> None:
    def task() -> Task:
        block = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Tanh())
        model = nn.Sequential(block, nn.Linear(8, 4, bias=False))
        return Task(model, (torch.ones(2, 4),), torch.sum, [block])

    plain = count(task(), WAYS["plain"], None)
    forward = ["mm", "tanh", "mm", "sum"]
    backward = ["ones_like", "mm", "mm", "tanh_backward", "mm", "add_", "add_"]
    assert Counter(kernel.name for kernel in plain.kernels) == Counter(forward + backward) and plain.launches == 11
    # tanh: 2 tensors (2, 8); sum: one (2, 4) and a number; ones_like: a number; tanh_backward: 3 tensors (2, 8);
    # add_: 3 weights (8, 4), twice
    assert plain.nbytes == 2 * 64 + (32 + 4) + 4 + 3 * 64 + 2 * 3 * 128
    assert sum(kernel.flops for kernel in plain.kernels) == 5 * 2 * 2 * 4 * 8

    checkpointed = count(task(), WAYS["checkpoint"], 1)
    more = Counter(kernel.name for kernel in checkpointed.kernels) - Counter(forward + backward)
    assert more == Counter(["mm", "tanh"]) and checkpointed.launches == 13
    assert checkpointed.nbytes == plain.nbytes + 2 * 64


def test_codes_and_replays_are_counted_as_on_an_accelerator() -> None:
    depth, sizes = 3, Sizes(3, 256)
    plain, converted = (count(sizes.make(MODELS["mlp"]), WAYS[name], None) for name in ("plain", "convert"))
    assert plain.couplings == depth and plain.elements == depth * 256 * 2 * 64
    names = Counter(kernel.name for kernel in converted.kernels)
    more = names - Counter(kernel.name for kernel in plain.kernels)
    assert names["encode"] == names["decode"] == 2 * depth - 1, "the last step forwards holds its stream"
    assert not more["sub"], "codes subtract"
    assert more["gelu"] == 2 * depth and more["addmm"] >= 2 * 2 * depth - 1
    assert more["ne"] == 1, "the end of the backward compares fingerprints"
    assert not {"bitwise_and_", "index_put_", "count_nonzero"} & names.keys(), "codes are fused, and not measured"
    encoded = next(kernel for kernel in converted.kernels if kernel.name == "encode")
    assert 3 * 65536 < encoded.nbytes < 3.5 * 65536, "a stream, the tensors of its prediction, and the code"


def test_memory_is_saved_while_kernels_are_counted() -> None:
    def kept(name: str) -> int:
        task = MODELS["mlp"].make(4, 256)
        with as_on_accelerators(KernelLog()):
            call = WAYS[name].build(task, None)
            task.loss_of(call).backward()
            return measure_memory(lambda: task.loss_of(call)).kept

    assert kept("convert") < kept("plain") / 3
