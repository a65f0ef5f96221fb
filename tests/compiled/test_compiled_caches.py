"""The compile caches of torch with `backend="revfx"` and with a `ReversiblePartitioner`: what hits, what must not."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import TOLERANCE, fp64, leaf, loss_of, relative_error
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters
from torch._functorch import config as functorch_config
from torch._functorch._aot_autograd.autograd_cache import AOTAutogradCache
from torch._inductor import config as inductor_config
from torch._inductor.codecache import FxGraphCache

import revfx
from revfx.compiled.partitioner import reports
from revfx.rules import Direction, Inverse, registered, unregister_inverse


__all__ = ["fp64"]
pytestmark = pytest.mark.xdist_group("caches")  # they are emptied before each test
DEPTH, ROWS = 3, 16
aten = torch.ops.aten
Door = Callable[..., dict[str, Any]]  # options of revfx and inductor to those of `torch.compile`
SWITCHES: list[tuple[Any, str, str]] = [
    (inductor_config, "fx_graph_cache", "TORCHINDUCTOR_FX_GRAPH_CACHE"),
    (functorch_config, "enable_autograd_cache", "TORCHINDUCTOR_AUTOGRAD_CACHE"),
]
HIT, MISS, BYPASS = "hit", "miss", "bypass"


def backend(**options: Any) -> dict[str, Any]:
    return {"backend": "revfx", "options": options}


def partitioner(**options: Any) -> dict[str, Any]:
    own = {name: options.pop(name) for name in ("strict",) if name in options}
    return {"options": {"custom_partitioner_fn": revfx.ReversiblePartitioner(**own), **options}}


DOORS = (backend, partitioner)
both_doors = pytest.mark.parametrize("door", DOORS)


@pytest.fixture(autouse=True)
def caches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Both caches empty, and on: even if environment variables, which outrank settings, turned them off."""
    for config, name, variable in SWITCHES:
        monkeypatch.setattr(vars(config)["_config"][name], "env_value_force", True)
        monkeypatch.setenv(variable, "1")  # of processes that a test starts
    FxGraphCache.clear()
    AOTAutogradCache.clear()
    with inductor_config.patch({"compile_threads": 1, "cpp.simdlen": 1}):
        yield
    torch.compiler.reset()


# --- models
def functions(count: int, width: int = 4) -> nn.ModuleList:
    return nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(count))


class Couplings(nn.Module):
    """Couplings of two streams, each followed by a function of its result."""

    def __init__(self, after: Callable[[Tensor], Tensor] = torch.neg) -> None:
        super().__init__()
        self.f, self.after = functions(DEPTH), after

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for f in self.f:
            a, b = b, self.after(a + f(b))
        return torch.cat([a, b], -1)


class Scaling(nn.Module):
    """Couplings that multiply by exp(s) with an s that nothing bounds."""

    def __init__(self) -> None:
        super().__init__()
        self.s = nn.ModuleList(nn.Sequential(nn.Tanh(), nn.Linear(4, 4)) for _ in range(DEPTH))

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for s in self.s:
            a, b = b * s(a).exp(), a
        return torch.cat([a, b], -1)


class Permuted(nn.Module):
    """Couplings with the columns in another order before each: `order` is a buffer, or numbers in the program."""

    def __init__(self, order: Tensor | list[int]) -> None:
        super().__init__()
        self.f = functions(DEPTH)
        self.order = nn.Buffer(order) if isinstance(order, Tensor) else order

    def forward(self, x: Tensor) -> Tensor:
        order = self.order if isinstance(self.order, Tensor) else torch.tensor(self.order)
        for f in self.f:
            a, b = x[:, order].chunk(2, -1)
            x = torch.cat([b, a + f(b)], -1)
        return x


class Masked(nn.Module):
    """Couplings of what a mask selects with what it doesn't."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.f = functions(DEPTH, 8)
        self.mask = nn.Buffer(mask)

    def forward(self, x: Tensor) -> Tensor:
        for i, f in enumerate(self.f):
            mask = self.mask if i % 2 else 1 - self.mask
            x = x + (1 - mask) * f(mask * x)
        return x


# --- what a compilation finds in the caches
def outcome() -> str:
    """HIT, MISS or BYPASS, the same in the cache of whole functions and in that of both their graphs."""
    whole, graphs = counters["aot_autograd"], counters["inductor"]
    counted = {what: (whole[f"autograd_cache_{what}"], graphs[f"fxgraph_cache_{what}"]) for what in (HIT, MISS, BYPASS)}
    (what,) = (what for what, numbers in counted.items() if numbers != (0, 0))
    assert counted[what] == (1, 2)
    return what


def compiled(model: nn.Module, x: Tensor, **options: Any) -> tuple[str, list[int]]:
    """What the caches said to a compilation, and the regions of the graph that it partitioned, if it did.

    The gradients are the plain model's whatever comes out of a cache.
    """
    torch.compiler.reset()
    counters.clear()
    with reports() as found:
        got = gradients(torch.compile(model, **options), model, x)
    assert relative_error(got, gradients(model, model, x)) < TOLERANCE
    return outcome(), [len(report.regions) for report in found]


def gradients(function: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss_of(function(x)), [x, *module.parameters()])


# --- options
@both_doors
def test_the_same_program_hits(door: Door) -> None:
    x = leaf(ROWS, 8)
    assert compiled(Couplings(), x, **door()) == (MISS, [1])
    for _ in range(2):
        assert compiled(Couplings(), x, **door()) == (HIT, [])  # other weights, another partitioner


OPTIONS: list[dict[str, Any]] = [{"strict": True}, {"max_fusion_size": 9}]


@pytest.mark.deep
@both_doors
def test_other_options_miss(door: Door) -> None:
    model, x = Couplings(), leaf(ROWS, 8)
    assert compiled(model, x, backend="inductor") == (MISS, [])
    for options in ({}, *OPTIONS):
        assert compiled(model, x, **door(**options)) == (MISS, [1])
    for options in (*OPTIONS, {}):
        assert compiled(model, x, **door(**options)) == (HIT, [])


def test_every_option_of_the_partitioner_is_part_of_the_key() -> None:
    assert len({revfx.ReversiblePartitioner(strict=strict).uuid() for strict in (False, True)}) == 2


PROGRAM = """
import torch
from torch import nn
from torch._dynamo.utils import counters
import revfx

torch._inductor.config.compile_threads = torch._inductor.config.cpp.simdlen = 1
functions, order = nn.ModuleList(nn.Linear(4, 4) for _ in range(3)), torch.arange(7, -1, -1)

def couplings(x):
    for f in functions:
        a, b = x[:, order].chunk(2, -1)
        x = torch.cat([b, a + f(b).tanh()], -1)
    return x

for door in {"backend": "revfx"}, {"options": {"custom_partitioner_fn": revfx.ReversiblePartitioner()}}:
    torch.compiler.reset()
    torch.compile(couplings, **door)(torch.randn(16, 8)).sum().backward()
print(*(counters["aot_autograd"]["autograd_cache_" + what] for what in ("hit", "miss", "bypass")))
"""


def test_another_process_hits() -> None:
    """The keys hold nothing that is new in every process."""
    runs = [subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True) for _ in range(2)]
    assert [run.stdout.split() for run in runs] == [["0", "2", "0"], ["2", "0", "0"]], runs[-1].stderr


# --- rules
@pytest.fixture
def rules_as_they_were() -> Iterator[None]:
    neg = registered()[aten.neg.default]
    yield
    unregister_inverse(aten.erf.default, aten.neg.default)
    revfx.register_inverse(aten.neg.default)(neg)


def erfinv(node: fx.Node) -> Iterator[Direction]:
    """A rule of the user: `y = erf(a)`; `a = erfinv(y)`."""
    yield Inverse(node.args[0], lambda y: y.erfinv())


@pytest.mark.deep
@both_doors
@pytest.mark.usefixtures("rules_as_they_were")
def test_a_rule_of_the_user_goes_past_the_caches(door: Door) -> None:
    model, x = Couplings(torch.erf), leaf(ROWS, 8)
    assert compiled(model, x, **door()) == (MISS, [0])
    revfx.register_inverse(aten.erf.default)(erfinv)
    for _ in range(2):
        assert compiled(model, x, **door()) == (BYPASS, [1])
    unregister_inverse(aten.erf.default)
    assert compiled(model, x, **door()) == (HIT, [])


@both_doors
@pytest.mark.usefixtures("rules_as_they_were")
def test_what_a_rule_made_is_not_found_when_the_rule_was_taken_away(door: Door) -> None:
    model, x = Couplings(torch.neg), leaf(ROWS, 8)
    assert compiled(model, x, **door()) == (MISS, [1])
    unregister_inverse(aten.neg.default)
    assert compiled(model, x, **door()) in ((MISS, [0]), (BYPASS, [0]))


# --- facts
TURNED, OTHER, TWICE = [7, 6, 5, 4, 3, 2, 1, 0], [3, 1, 2, 0, 7, 6, 4, 5], [0, 0, 1, 2, 3, 4, 5, 6]
MASK, SHADES = [0.0, 1.0] * 4, [0.2, 0.8] * 4
of_both_facts = pytest.mark.parametrize(
    ("build", "values", "others", "none"),
    [
        (Permuted, TURNED, OTHER, TWICE),
        pytest.param(Masked, MASK, MASK[::-1], SHADES, marks=pytest.mark.deep),
    ],
)


@of_both_facts
def test_a_buffer_that_is_no_permutation_or_mask_any_more_misses(
    build: Callable[[Tensor], nn.Module], values: list[float], others: list[float], none: list[float]
) -> None:
    model, x = build(torch.tensor(values)), leaf(ROWS, 8)
    assert compiled(model, x, **backend()) == (MISS, [1])
    (buffer,) = model.buffers()
    for held, found in [(others, (HIT, [])), (none, (MISS, [0])), (none, (HIT, [])), (values, (HIT, []))]:
        buffer.copy_(torch.tensor(held))
        assert compiled(model, x, **backend()) == found


@of_both_facts
def test_a_partitioner_by_itself_sees_no_values_and_so_relies_on_none(
    build: Callable[[Tensor], nn.Module], values: list[float], others: list[float], none: list[float]
) -> None:
    model, x = build(torch.tensor(values)), leaf(ROWS, 8)
    assert compiled(model, x, **partitioner()) == (MISS, [0])
    (buffer,) = model.buffers()
    for held in (others, none):
        buffer.copy_(torch.tensor(held))
        assert compiled(model, x, **partitioner()) == (HIT, [])


@pytest.mark.deep
@both_doors
def test_numbers_in_the_program_are_part_of_it(door: Door) -> None:
    model, x = Permuted(TURNED), leaf(ROWS, 8)
    for order, found in [(TURNED, (MISS, [1])), (TWICE, (MISS, [0])), (TURNED, (HIT, []))]:
        model.order = order
        assert compiled(model, x, **door()) == found


# --- what a function out of a cache still checks
def test_a_function_out_of_the_cache_checks_its_permutation() -> None:
    model, x = Permuted(torch.tensor(TURNED)), leaf(ROWS, 8)
    assert [compiled(model, x, **backend())[0] for _ in range(2)] == [MISS, HIT]
    function = torch.compile(model, **backend())
    function(x)
    assert isinstance(model.order, Tensor)
    model.order.copy_(torch.tensor(TWICE))
    with pytest.raises(RuntimeError, match=rf"an index is no permutation \(.*, at .*{__name__}\.py:\d+\)"):
        loss_of(function(x)).backward()
