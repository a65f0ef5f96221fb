"""What `explain` says: regions, values, refusals, ways, advice; of plain, converted and compiled models."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import revfx
from revfx.errors import Reason, Refusal
from revfx.passes.formula import Term
from revfx.report.data import ValueLine, alike, folded
from revfx.report.describe import type_name
from revfx.report.explanation import Explanation
from revfx.units import count, size


class Net(nn.Module):
    def __init__(self, depth: int, d: int = 8) -> None:
        super().__init__()
        make = lambda: nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))  # noqa: E731
        self.f, self.g = (nn.ModuleList(make() for _ in range(depth)) for _ in "fg")

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        for f, g in zip(self.f, self.g, strict=True):
            a = a + f(b)
            b = b + g(a)
        return torch.cat([a, b], dim=-1)


@pytest.fixture(scope="module")
def found() -> Explanation:
    return revfx.explain(Net(6), torch.randn(32, 16))


def test_regions(found: Explanation) -> None:
    (region,) = found.regions
    assert (region.couplings, region.kind, region.kept_cuts) == (12, "additive", 2)
    line = Net.forward.__code__.co_firstlineno
    assert region.first.endswith(f"test_explain.py:{line + 3}") and region.last.endswith(f"test_explain.py:{line + 5}")
    assert region.streams == ("f32[32,16]",) and region.kept_bytes == 32 * 16 * 4
    assert region.freed_bytes > 10 * region.kept_bytes
    assert found.model == "Net" and found.inputs == ("f32[32,16]",) and found.couplings == 12


def test_values_say_how_they_come_back(found: Explanation) -> None:
    lines = {line.name: str(line) for line in found.regions[0].values}
    inverted = [text for text in lines.values() if " invert " in text]
    assert inverted and all(text.startswith("f32[32,8] invert") for text in inverted)
    actions = {line.action for line in found.regions[0].values}
    assert actions == {"invert", "recompute", "save"}
    first = next(line for line in found.regions[0].values if line.action == "invert" and " - " in line.how)
    head, _, formula = first.how.partition(" <- ")
    y, _, f = formula.partition(" - ")
    assert head in lines and y in lines and f.startswith(("f.", "g."))


def test_stages_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="revfx.report"):
        revfx.explain(Net(2), torch.randn(4, 16))
    assert caplog.messages == ["counting a plain step", "looking for regions, and counting a step with them"]


def test_the_text_folds_layers() -> None:
    long = str(revfx.explain(Net(50), torch.randn(32, 16)))
    assert len(long.splitlines()) < 40
    assert "more like this" in long and "1 reversible region, 100 couplings" in long
    assert "plain" in long and "revfx" in long


def test_ways(found: Explanation) -> None:
    plain, ours = found.way("plain"), found.way("revfx")
    assert plain and ours and plain.peak and ours.peak
    assert plain.peak > 3 * ours.peak
    assert plain.flops and ours.flops and 1.2 < ours.flops / plain.flops < 1.4
    assert max(ours.live) == ours.peak and ours.kept in ours.live and 0 < ours.backward < len(ours.live)
    assert found.way("nothing") is None


def test_the_model_is_left_alone() -> None:
    model = nn.Sequential(Net(3), nn.BatchNorm1d(16), nn.Dropout())
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    revfx.explain(model, torch.randn(8, 16, generator=torch.Generator()), measure=True)
    now = model.state_dict()
    assert all(torch.equal(t, before[name]) for name, t in now.items())
    assert torch.equal(torch.get_rng_state(), state) and all(p.grad is None for p in model.parameters())
    assert type(model) is nn.Sequential


def test_measured() -> None:
    found = revfx.explain(revfx.convert(Net(6), exact=False), torch.randn(256, 16), measure=True)
    for way in found.ways:
        assert way.measured_peak and way.peak and abs(way.peak / way.measured_peak - 1) < 0.1
        assert way.seconds and way.seconds > 0
    assert not found.advice


def test_a_converted_model_keeps_its_options() -> None:
    model, x = Net(8), torch.randn(32, 16)
    (rounding,) = revfx.explain(revfx.convert(model, exact=False), x, measure=True).regions
    (lossless,) = revfx.explain(revfx.convert(model), x).regions
    assert not rounding.lossless and rounding.code_bytes == 0
    assert lossless.lossless and lossless.code_bytes > 0


def test_keyword_arguments() -> None:
    class Two(Net):
        def forward(self, x: Tensor, *, y: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(torch.cat([x, y], -1))

    found = revfx.explain(Two(4), torch.randn(8, 8), {"y": torch.randn(8, 8)}, measure=True)
    assert found.couplings == 8 and found.way("revfx") is not None


def test_keyword_of_the_model_that_is_called_as_an_option() -> None:
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 1)
    target, mem = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    found = revfx.explain(decoder, target, kwargs={"memory": mem})
    assert found.model == "TransformerDecoder" and found.inputs == ("f32[2,5,16]", "f32[2,7,16]") and found.fit is None
    assert found.way("plain") is not None
    budgeted = revfx.explain(decoder, (target,), {"memory": mem}, memory=0.5)
    assert budgeted.fit is not None and budgeted.fit.budget == budgeted.fit.plain // 2


def test_rev_block_inside_a_model() -> None:
    block = revfx.RevBlock(lambda: nn.Linear(8, 8), lambda: nn.Linear(8, 8), 6)

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat(self.block(x, x * 2), -1)

    assert revfx.explain(Own(), torch.randn(64, 8)).couplings >= 10


def test_nothing_reversible() -> None:
    found = revfx.explain(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(2, 4))
    assert found.regions == () and found.refusals and found.way("revfx") is None
    assert "nothing reversible was found" in str(found) and "memory=0.5" in str(found)


def test_residual_networks_get_the_usual_advice() -> None:
    class ResNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            for f in self.f:
                x = x + f(x)
            return x

    text = str(revfx.explain(ResNet(), torch.randn(2, 8)))
    assert "solving for it would need it" in text and "split the stream in two" in text


def test_a_model_that_asks_for_values_is_explained_if_it_is_measured() -> None:
    class Branches(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if x.sum() > 0 else -x)

    found = revfx.explain(Branches(4), torch.randn(8, 16))
    assert "no prediction" in found.notes[0] and "measure=True" in found.notes[0] and not found.regions
    seen = revfx.explain(Branches(4), torch.randn(8, 16), measure=True)
    assert seen.way("plain") is not None and seen.couplings == 8


class AsksBuffer(Net):
    def __init__(self, depth: int) -> None:
        super().__init__(depth)
        self.ready: Tensor
        self.register_buffer("ready", torch.tensor(True))

    def forward(self, x: Tensor) -> Tensor:
        if not self.ready:
            raise ValueError("set it up first")
        return super().forward(x)


def test_regions_of_a_model_that_asks_for_the_numbers_of_buffers() -> None:
    found = revfx.explain(AsksBuffer(6), torch.randn(32, 16))
    (region,) = found.regions
    assert region.couplings == 12 and found.way("revfx") is not None


def test_compiled_graphs_and_their_breaks() -> None:
    class Breaks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Net(6), Net(6)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            if y.sum().item() > 1e9:
                return y
            return self.second(y)

    found = revfx.explain(Breaks(), torch.randn(32, 16), backend="revfx")
    assert [len(regions) for regions in found.graphs] == [1, 1] and found.couplings == 24
    assert any("test_explain.py" in reason and "item" in reason for reason in found.breaks)
    assert "graph 1: 1 region" in str(found) and "graph break" in str(found)


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match="wrap the function in a module"):
        revfx.explain(F.relu, torch.ones(2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="backend='inductor'"):
        revfx.explain(Net(2), torch.ones(2, 16), backend="inductor")
    with pytest.raises(ValueError, match="the backend has no budgets"):
        revfx.explain(Net(2), torch.ones(2, 16), memory=0.5, backend="revfx")
    with pytest.raises(RuntimeError, match="reduction dim"):
        revfx.explain(Net(2), torch.ones(2, 15))
    with pytest.raises(revfx.RevfxError, match="no output of the model needs a gradient"):
        revfx.explain(Net(2).requires_grad_(False), torch.ones(2, 16))


def test_saving(found: Explanation, tmp_path: Path) -> None:
    found.save(tmp_path / "x.json")
    data = json.loads((tmp_path / "x.json").read_text())
    assert data["regions"][0]["couplings"] == 12 and data["ways"][1]["way"] == "revfx"
    with pytest.raises(revfx.RevfxError, match=r"must end in .html, .svg or .json"):
        found.save(tmp_path / "x.png")


@pytest.mark.deep
def test_hundreds_of_couplings_are_explained() -> None:
    found = revfx.explain(Net(100), torch.randn(4, 16))
    assert found.couplings == 200 and len(str(found).splitlines()) < 40


def test_small_texts() -> None:
    assert type_name(torch.bfloat16, (2, 3)) == "bf16[2,3]" and type_name(torch.int64, ()) == "i64[]"
    assert type_name(torch.bool, (1,)) == "bool[1]" and type_name(torch.uint8, (1,)) == "u8[1]"
    assert [size(n) for n in (5, 2048, 3 << 20, 5 << 30)] == ["5 B", "2.0 KiB", "3.0 MiB", "5.00 GiB"]
    assert [count(n) for n in (5, 2e3, 3e6, 4e9, 5e12)] == ["5", "2 k", "3 M", "4 G", "5 T"]


def test_formulas() -> None:
    x, y = Term("x"), Term("y")
    assert (x - (y + 1)).text == "x - (y + 1)" and ((x - y) * 2).text == "(x - y) * 2"
    assert (-(x + y)).text == "-(x + y)" and (2 / x).text == "2 / x" and (x - y - x).text == "x - y - x"
    assert x.view(2, -1).text == "x.view(2, -1)" and torch.cat([x, y], 1).text == "cat([x, y], 1)"  # type: ignore[list-item]
    assert torch.sub(x, y).text == "x - y"  # type: ignore[arg-type]


def test_folding_finds_periods() -> None:
    def line(step: int, kind: str) -> ValueLine:
        return ValueLine(f"v{step}", kind, "invert", "", "a.py:1", step)

    values = [line(i, "ab"[i % 2]) for i in range(20)] + [line(20, "c")]
    assert [(len(lines), times) for lines, times in folded(values)] == [(2, 10), (1, 1)]


def test_refusals_that_differ_in_numbers_are_told_once() -> None:
    def added(name: str) -> Refusal:
        return Refusal(Reason.NO_COUPLING, ("add",), "m.py:1", f"`{name}` is")

    other = Refusal(Reason.NO_RULE, ("f",), "", "x")
    assert alike([added("a_1"), added("a_22"), other]) == [(added("a"), 2), (other, 1)]
