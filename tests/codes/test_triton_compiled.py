"""Triton's kernels compile for accelerators that are not there, and fit their registers."""

from __future__ import annotations

import importlib
import operator
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import deep_but
from torch import Tensor

from revfx.codes.format import GROUP, Prediction


triton: Any = pytest.importorskip("triton", exc_type=ImportError)
if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET is set: nothing is compiled", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:TRITON_DEFAULT_FP_FUSION:UserWarning")

MAX_REGISTERS = 128
TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
CODES = (
    (torch.bfloat16, operator.sub, 2),
    (torch.float32, operator.add, 4),
    (torch.float16, operator.sub, 0),
    (torch.float64, operator.sub, 8),
    (torch.bfloat16, None, 8),
)


@pytest.fixture(params=deep_but(["sm_90", "gfx942"], TARGETS))  # the older one by the compiler of the newer
def compiled(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], list[Any]]:
    """A function that returns the kernels compiled so far; calls of `revfx.codes.triton` compile and don't launch."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    module: Any = importlib.import_module("revfx.codes.triton")
    name = request.param
    target = importlib.import_module("triton.backends.compiler").GPUTarget(*TARGETS[name])
    driver = SimpleNamespace(
        get_current_device=lambda: name, get_current_stream=lambda device: 0, get_current_target=lambda: target
    )
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    kernels: list[Any] = []

    def compile_only(kernel: Any, bits: Tensor, *args: Any, **constants: Any) -> None:
        num_warps = module.threads_of(bits.element_size()) // target.warp_size
        kernels.append(kernel.warmup(*args, grid=(1,), num_warps=num_warps, enable_fp_fusion=False, **constants))

    monkeypatch.setattr(module, "_launch", compile_only)
    return lambda: kernels


def cuda_resources(kernel: Any, path: Path) -> dict[str, int]:
    """Return the registers of a thread, and the bytes that it has on a stack, where registers go that do not fit."""
    path.write_bytes(kernel.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    text = subprocess.run([tool, "--dump-resource-usage", str(path)], capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"(REG|STACK):(\d+)", text)}


def assert_fits(kernel: Any, path: Path) -> None:
    if "ptx" in kernel.asm:
        resources = cuda_resources(kernel, path)
        assert resources["REG"] <= MAX_REGISTERS and resources["STACK"] == 0, (kernel.name, resources)
        assert not re.search(r"\bfma\.|\.ftz", kernel.asm["ptx"]), kernel.name
    else:
        text = kernel.asm["amdgcn"]
        resources = {name: int(number) for name, number in re.findall(r"\.([vs]gpr(?:_spill)?_count):\s*(\d+)", text)}
        assert resources["vgpr_count"] <= MAX_REGISTERS, (kernel.name, resources)
        assert resources["vgpr_spill_count"] == resources["sgpr_spill_count"] == 0, (kernel.name, resources)
        modes = re.findall(r"\.amdhsa_float_denorm_mode_\w+ (\d)", text)
        assert modes == ["3", "3"], kernel.name  # denormals stay


def test_kernels_compile(compiled: Callable[[], list[Any]], tmp_path: Path) -> None:
    codes: Any = importlib.import_module("revfx.codes.triton")
    for dtype, by, width in CODES:
        x = torch.zeros(GROUP, dtype=dtype)
        prediction = Prediction((x, x) if by else (x,), by)
        codes.decode(prediction, codes.encode(x, prediction, width, 100))
        codes.fingerprint(x)
    codes.unpack_marks(codes.pack_marks(torch.zeros(GROUP, dtype=torch.bool)), GROUP, torch.bfloat16)
    for kernel in compiled():
        assert_fits(kernel, tmp_path / "kernel")
    assert len(compiled()) == 3 * len(CODES) + 2


def test_length_needs_one_kernel(compiled: Callable[[], list[Any]]) -> None:
    """A kernel serves all multiples of 16 elements, and all room, as each new one takes a second to compile."""
    codes: Any = importlib.import_module("revfx.codes.triton")
    x = torch.zeros(3 * GROUP)

    def encode(x: Tensor, room: int) -> None:
        codes.encode(x, Prediction((x,)), 2, room)

    for n, room in ((16, 3), (GROUP, 32), (3 * GROUP, 1000)):
        encode(x[:n], room)
    assert len({id(kernel) for kernel in compiled()}) == 1
