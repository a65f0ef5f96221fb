"""What the bench measures of a contender, and what it says of one that fails."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from revfx.bench.measure import Setting, measure_steps, prepare
from revfx.bench.models import MODELS, BenchModel, Chain
from revfx.bench.results import Row
from revfx.bench.ways import WAYS, Call, Way


MLP = MODELS["mlp"]


def made(name: str, call: Call, **options: Any) -> Way:
    """A contender; `call` is given the model and its inputs."""

    def build(bench: BenchModel, model: Chain, inputs: tuple[Tensor, ...]) -> Call:
        return lambda *x: call(model, *x)

    return Way(name, name, build, **options)


def rows(*ways: Way, bench: BenchModel = MLP, depth: int = 4, rounds: int = 3) -> dict[str, Row]:
    """What is measured of these and plain autograd, by name."""
    ticks: list[str] = []
    found = measure_steps(Setting(bench, depth, 32), [WAYS["plain"], *ways], rounds, ticks.append)
    assert len(ticks) == 1 + len(ways) + rounds + 1
    assert [r.way for r in found] == ["plain", *(w.name for w in ways)]
    return {r.way: r for r in found}


def test_memory_time_and_gradients() -> None:
    found = rows(WAYS["convert"], WAYS["checkpoint"])
    plain, ours = found["plain"], found["convert"]
    assert plain.ratio == plain.ratio_low == plain.ratio_high == 1.0
    assert plain.gradients == sum(4 * p.numel() for p in MLP.make(4).parameters())
    for r in found.values():
        assert r.kept and r.peak and r.kept < r.peak
        assert r.error is not None and 0 < r.error < 1e-5
        assert r.seconds and r.ratio and r.ratio_low and r.ratio_high and r.ratio_low <= r.ratio <= r.ratio_high
        assert (r.model, r.depth, r.batch, r.notes, r.failed) == ("mlp", 4, 32, (), False)
    assert ours.kept and plain.kept and ours.peak and plain.peak
    assert ours.kept < plain.kept / 8 and ours.peak < plain.peak / 2


def test_wrong_and_missing_gradients_are_said_to_be_so() -> None:
    wrong = made("wrong", lambda model, x: model(x) * 1.01)
    missing = made("missing", lambda model, x: model.head(model.stem(x).detach()))
    poisoned = made("nan", lambda model, x: model(x) * float("nan"))
    found = rows(wrong, missing, poisoned)
    assert found["wrong"].failed and found["wrong"].notes == ("WRONG gradients: in fp64 off by 2e-02",)
    assert found["wrong"].error == pytest.approx(1.01**2 - 1, rel=1e-3)
    for name in ("missing", "nan"):
        assert found[name].failed and found[name].notes == ("WRONG gradients: one is missing or NaN",)
        assert found[name].error != found[name].error
    assert not found["plain"].failed and found["wrong"].seconds, "it is measured all the same"


def test_gradients_that_are_right_in_fp64_are_off_by_rounding() -> None:
    rounds = made("rounds", lambda model, x: model(x) * (1.01 if x.dtype == torch.float32 else 1.0))
    row = rows(rounds)["rounds"]
    assert not row.failed and row.notes == ("gradients are off by rounding: in fp64 by 0e+00",)
    assert row.error == pytest.approx(1.01**2 - 1, rel=1e-3)


def test_what_raises_is_a_row_of_its_own() -> None:
    calls = 0

    def later(model: Chain, x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 3:
            raise RuntimeError("only three times\nand more")
        return model(x)

    def never(model: Chain, x: Tensor) -> Tensor:
        raise KeyError("never")

    found = rows(made("later", later), made("never", never), WAYS["convert"])
    assert found["later"].failed and found["later"].notes == ("raises RuntimeError: only three times",)
    assert found["later"].peak and found["later"].seconds is None
    assert found["never"].failed and found["never"].notes == ("raises KeyError: 'never'",)
    assert not found["convert"].failed and found["convert"].ratio


def test_what_does_not_apply_is_said_and_not_a_failure() -> None:
    row = prepare(Setting(MODELS["flow"], 2, 4), WAYS["rev_block"]).row
    assert not row.failed and row.peak is None and "log-determinant" in row.notes[0]


def test_statistics_that_are_updated_twice_are_noted() -> None:
    found = rows(WAYS["checkpoint"], WAYS["convert"], bench=MODELS["revnet"], depth=1, rounds=1)
    assert found["checkpoint"].notes == (
        "a step changes 12 buffers otherwise than plain's (`blocks.0.f.1.running_mean`)",
    )
    assert found["convert"].notes == () and not found["checkpoint"].failed


def test_steps_that_a_way_takes_to_prepare_itself_leave_no_statistics_behind() -> None:
    def build(bench: BenchModel, model: Chain, inputs: tuple[Tensor, ...]) -> Call:
        bench.loss(model(*inputs)).backward()
        return model

    found = rows(Way("prepares", "prepares", build), bench=MODELS["revnet"], depth=1, rounds=1)
    assert found["prepares"].notes == () and found["prepares"].error == found["plain"].error


def test_warnings_of_revfx_are_noted() -> None:
    bench = replace(MLP, build=lambda depth: Residual())
    assert "nothing reversible was found" in rows(WAYS["convert"], bench=bench)["convert"].notes[0]


class Residual(Chain):
    def __init__(self) -> None:
        super().__init__([])
        self.linear = torch.nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x).tanh()


def test_new_gradients_of_a_compiled_backward_are_not_part_of_its_peak() -> None:
    plain = prepare(Setting(MLP, 4, 512), WAYS["plain"]).row
    same = prepare(Setting(MLP, 4, 512), made("compiled", lambda model, x: model(x), compiled=True)).row
    assert plain.peak and same.peak and plain.gradients and plain.kept
    assert plain.peak - plain.gradients < plain.kept, "so that less than was kept would be left of it"
    assert same.peak == same.kept == plain.kept
