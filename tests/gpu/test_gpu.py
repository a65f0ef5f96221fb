"""What only a GPU can show: the bits of its kernels, waits of the host, captured steps, and its allocator's peaks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from bench import run
from bench.measure import Sizes
from bench.models import MODELS, Task
from codes_cases import FLOATS, LENGTHS, assert_alike, assert_same, cases
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from training import assert_same_steps
from zoo import ZOO

import revfx
from revfx.codes import WIDTHS, Prediction, aten, implementation
from revfx.testing import measure_memory


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
CHAINS = ("mlp", "revnet", "transformer", "flow", "leapfrog")
STEPS = 10  # after which codes are counted in the 16th call
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "hipStreamSynchronize")


def tasks(name: str, is_bf16: bool = False) -> tuple[Task, Task]:
    """The task of a chain on the GPU, and a copy with weights of its own."""
    task = Sizes(device="cuda", is_bf16=is_bf16).make(MODELS[name])
    return task, copy.deepcopy(task)


def gradients(task: Task, call: Any, seed: int) -> list[Tensor]:
    """The loss, gradients and buffers of a step."""
    torch.manual_seed(seed)
    task.model.zero_grad()
    loss = task.loss_of(call)
    loss.backward()
    parts = [p.grad for p in task.model.parameters() if p.grad is not None]
    return [loss.detach(), *(t.clone() for t in parts), *(t.clone() for t in task.model.buffers())]


def waits_of(found: profile) -> int:
    return sum(event.count for event in found.key_averages() if event.key in WAITS)


def steady(name: str) -> tuple[Task, Any]:
    """A chain whose converted model has learnt its plan and its codes."""
    task, _ = tasks(name)
    call = revfx.convert(task.model)
    for seed in range(STEPS):
        gradients(task, call, seed)
    return task, call


@pytest.mark.parametrize("is_bf16", (False, True))
@pytest.mark.parametrize("name", CHAINS)
def test_training_has_the_bits_of_plain_autograd(name: str, is_bf16: bool) -> None:
    ours, plain = tasks(name, is_bf16)
    call = revfx.convert(ours.model)
    for seed in range(4):
        for got, want in zip(gradients(ours, call, seed), gradients(plain, plain.model, seed), strict=True):
            assert torch.equal(got, want), (seed, name)


@pytest.mark.parametrize("name", ZOO)
def test_the_zoo_has_the_bits_of_plain_autograd(name: str) -> None:
    make, inputs = ZOO[name]
    plain = make(4).cuda()
    ours = revfx.convert(copy.deepcopy(plain))
    assert_same_steps(ours, plain, [t.cuda() for t in inputs(16)])


@pytest.mark.parametrize("name", CHAINS)
def test_the_host_waits_once_at_the_end_of_the_backward(name: str) -> None:
    task, call = steady(name)
    task.model.zero_grad()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as forward:
        loss = task.loss_of(call)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as backward:
        loss.backward()
    # the profiler itself waits for the device as it ends
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as nothing:
        pass
    assert (waits_of(forward) - waits_of(nothing), waits_of(backward) - waits_of(nothing)) == (0, 1)


def test_a_captured_step_gives_the_gradients_of_plain_autograd() -> None:
    ours, plain = tasks("mlp")
    call = revfx.convert(ours.model)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for seed in range(STEPS):
            gradients(ours, call, seed)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    ours.model.zero_grad()
    with torch.cuda.graph(graph):
        ours.loss_of(call).backward()
    for _ in range(2):
        for p in ours.model.parameters():
            assert p.grad is not None
            p.grad.zero_()
        graph.replay()
        want = gradients(plain, plain.model, 0)[1:]
        got = [p.grad for p in ours.model.parameters() if p.grad is not None]
        assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("share", (0.6, 0.3))
def test_the_allocators_peak_stays_within_a_budget(share: float) -> None:
    ours, plain = tasks("mlp")
    peak = measure_memory(lambda: plain.loss_of(plain.model), device="cuda").peak
    call = revfx.convert(ours.model, memory=int(share * peak))
    found = measure_memory(lambda: ours.loss_of(call), device="cuda").peak
    assert found <= share * peak


@pytest.mark.parametrize("dtype", FLOATS)
def test_codes_have_the_bytes_of_the_reference(dtype: torch.dtype) -> None:
    if implementation(torch.device("cuda")) != "triton":
        pytest.skip("Triton is not installed")
    from revfx.codes import triton

    for n in LENGTHS:
        for name, x, prediction in cases(dtype, n):
            on_gpu = Prediction(tuple(t.cuda() for t in prediction.tensors), prediction.by)
            for width in WIDTHS:
                code, at = triton.encode(x.cuda(), on_gpu, width), f"{n} {name}, {width} bits"
                assert_alike(code, aten.encode(x.cuda(), on_gpu, width), at)
                back, words = triton.decode(on_gpu, code)
                assert_same(back.cpu(), x, at)
                assert torch.equal(words, code.words), at


def test_the_bench_runs() -> None:
    assert run.main(["--device", "cuda", "--short", "--models", "mlp,transformer"]) == 0
