"""Fixtures for all tests, and what they have in common before torch is imported."""

from __future__ import annotations

import gc
import logging
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from importlib import import_module

import pytest
from programs_report import Reporter


# One folder of compiled kernels for a run of the tests, its workers included, which inherit the variable; whole graphs
# are always compiled anew, so that there is something to look at. The tests of the caches turn them on for themselves.
OWN_KERNELS = "TORCHINDUCTOR_CACHE_DIR" not in os.environ
if OWN_KERNELS:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="revfx-tests-")
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")  # else it compiles eight programs first to try what works
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # the workers are as many as the cores already
os.environ.setdefault("TORCH_DYNAMO_RUN_GC_AFTER_COMPILE", "0")  # the collector runs as seldom as is said below
os.environ["TORCHINDUCTOR_FX_GRAPH_CACHE"] = os.environ["TORCHINDUCTOR_AUTOGRAD_CACHE"] = "0"

import torch  # noqa: E402  (it reads these)


logging.getLogger("torch.__trace").propagate = True  # or pytest listens to it, and torch prints every graph for it
torch.set_num_threads(1)  # small tensors: threads only wait for each other


# Files that take a minute or more: workers begin with them, or the last one is alone with one at the end.
LONG = ("test_distributed", "test_caches", "test_faults", "test_distributed_budgets", "test_fit", "test_feasible")
# Files that compile much come last, the longest first: torch keeps so much of each compilation that the collector, and
# the search for what a recording that failed has left behind, take several times as long afterwards.
COMPILING = (
    "test_functions", "test_zoo_compiled", "test_compiled_budgets", "test_flows", "test_compiled_caches",
    "test_compiled_guards", "test_compiled_distributed", "test_compiled_blocks", "test_programs",
    "test_compiled_random", "test_compiled_situations", "test_coded", "test_block_compiled", "test_traced",
    "test_aliases", "test_backend", "test_compiled_sizes", "test_long", "test_compiled_streams",
    "test_compiled_state", "test_compiled_rounding", "test_faults_compiled",
)  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("random programs")
    group.addoption("--programs", type=int, default=1000, help="how many of them a long run (-m fuzz) takes")
    group.addoption("--programs-seed", type=int, help="what they are drawn from; a random number if not given")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "fuzz: long runs of random programs, left out unless selected by `-m fuzz`")
    config.addinivalue_line("markers", "deep: compiles or measures for long; left out unless REVFX_DEEP is set")
    if config.option.programs_seed is None:  # once, before the options go to the workers
        config.option.programs_seed = random.randrange(10**6)
    config.pluginmanager.register(Reporter(config))
    config.option.loadscopereorder = False  # of pytest-xdist, which would go by how many tests files have


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out long tests unless they are asked for, and order the rest."""
    deep = [] if os.environ.get("REVFX_DEEP") else [item for item in items if item.get_closest_marker("deep")]
    config.hook.pytest_deselected(items=deep)
    left_out = set(deep)
    items[:] = [item for item in items if item not in left_out]
    order = {name: at for at, name in enumerate((*LONG, "", *COMPILING))}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONG)))


def pytest_collection_finish() -> None:
    """Let the garbage collector run less often: torch and its compilers have half a million objects to visit, and
    compiling makes many.
    """
    gc.set_threshold(50_000, 20, 50)


def pytest_runtestloop() -> None:
    """Skip the texts that torch writes for each graph, and its times of guards: nobody reads them here."""
    patch = pytest.MonkeyPatch()
    patch.setattr(import_module("torch._dynamo.guards"), "profile_guard_manager", lambda *args: 0.0)
    patch.setattr(torch.fx.GraphModule, "print_readable", lambda *args, **options: "")


def pytest_unconfigure() -> None:
    """Remove the folder of kernels, in the process that made it."""
    if OWN_KERNELS:
        shutil.rmtree(os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def coded() -> Iterator[None]:
    """Have values of any size coded, as models of tests are small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("revfx.codes.codec.MIN_BYTES", 0)
        yield


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave small values uncoded, as users have them."""
    monkeypatch.setattr("revfx.codes.codec.MIN_BYTES", 1 << 12)


@pytest.fixture
def fp64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
