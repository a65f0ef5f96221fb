"""The pictures of an explanation: what is drawn where, and that the SVG is the same, and well-formed, each time."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from xml.etree import ElementTree

import matplotlib
import pytest
import torch
from torch import Tensor, nn
from zoo import AffineExp, Momentum, Transformer, TwoStages, images

import revfx
from revfx.errors import Refusal, RevfxError
from revfx.report.data import RegionInfo, Timeline, Usage, ValueLine, alike
from revfx.report.explanation import Explanation
from revfx.report.figures import PALETTE
from revfx.report.graph import MOST_IN_REGION, MOST_REGIONS, clipped, graph_svg, memory_svg
from revfx.report.graph_layout import READS, SOLVED, Layout, layout, spanned
from revfx.report.memory import thinned


SVG = "{http://www.w3.org/2000/svg}"


class Residual(nn.Module):
    """Nothing of it can be computed back."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.f = nn.ModuleList(nn.Linear(8, 8) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for f in self.f:
            x = torch.relu(x + f(x))
        return x


@pytest.fixture(scope="module")
def transformer() -> Explanation:
    return revfx.explain(Transformer(12), torch.randint(0, 20, (4, 12)))


def texts(svg: str) -> list[str]:
    """What is written in a picture; it is parsed, so it is well-formed."""
    return ["".join(t.itertext()).strip() for t in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def chain(depth: int, distinct: bool = False) -> RegionInfo:
    """A region of `depth` values, one stream, each in a step of its own."""
    values = [
        ValueLine(f"v_{i}", f"f32[{i if distinct else 8}]", "invert", f"v_{i} <- ...", "m.py:1", i, 32,
                  reads=(f"v_{i - 1}",) if i else (), solved=(f"v_{i + 1}",) if i + 1 < depth else ())
        for i in range(depth)
    ]  # fmt: skip
    return RegionInfo(
        "net", "m.py:1", "m.py:2", "additive", depth, depth, ("f32[8]",), (), 32, 2, 32, 0.0, tuple(values)
    )


def explained(*regions: RegionInfo, **more: object) -> Explanation:
    return replace(Explanation("Net", ("f32[8]",), regions, ()), **more)


# --- where values lie
def at(found: Layout, name: str) -> tuple[float, int]:
    return next((n.x, n.row) for n in found.nodes if n.name == name)


def test_streams_run_straight_down_and_functions_lie_between_them(transformer: Explanation) -> None:
    found = layout(transformer.regions[0], 90)
    assert [at(found, f"add_{n}")[0] for n in ("{1…21}", "23")] == [1.0, 1.0]
    assert [at(found, name)[0] for name in ("embedding", "add", "add_{2…22}", "div")] == [0.0, 0.0, 0.0, 0.0]
    assert {n.x for n in found.nodes if n.name.startswith(("feed", "attention"))} == {0.5}
    assert len({(n.x, n.row) for n in found.nodes}) == len(found.nodes), "two values in one place"


def test_layers_that_come_again_are_laid_out_once(transformer: Explanation) -> None:
    found = layout(transformer.regions[0], 90)
    (frame,) = found.frames
    assert frame.times == 11
    inside = [n.name for n in found.nodes if frame.first <= n.row <= frame.last]
    assert inside == ["attention_{0…10}", "add_{1…21}", "feed_{0…10}", "add_{2…22}"]
    assert len(found.nodes) < 20 < len(transformer.regions[0].values)


def test_what_is_read_is_above_and_what_is_solved_from_is_the_next(transformer: Explanation) -> None:
    found = layout(transformer.regions[0], 90)
    names = [n.name for n in found.nodes]
    edges = {(names[a], names[b], kind) for a, b, kind in found.edges}
    assert {
        ("add_{1…21}", "feed_{0…10}", READS), ("feed_{0…10}", "add_{2…22}", READS), ("add", "add_{2…22}", READS),
        ("add_23", "add_{1…21}", SOLVED), ("attention_11", "add_{1…21}", SOLVED), ("div", "add_{2…22}", SOLVED),
    } <= edges  # fmt: skip
    rows = {n.name: n.row for n in found.nodes}
    assert all(rows[a] < rows[b] for a, b, kind in edges if kind == READS)


@pytest.mark.parametrize("model", [AffineExp(5), Momentum(30)], ids=["affine", "momentum"])
def test_no_two_values_are_in_one_place(model: nn.Module) -> None:
    (region,) = revfx.explain(model, torch.randn(8, 32)).regions
    found = layout(region, 90)
    assert len({(n.x, n.row) for n in found.nodes}) == len(found.nodes) and not found.left_out


def test_values_that_are_not_alike_are_cut_off_at_the_limit() -> None:
    found = layout(chain(100, distinct=True), 30)
    assert len(found.nodes) == 30 and found.left_out == 70
    assert max(max(a, b) for a, b, _ in found.edges) < 30


def test_a_span_of_names() -> None:
    assert spanned("add_1", "add_21") == "add_{1…21}"
    assert spanned("stage1_0_f", "stage1_22_f") == "stage1_{0…22}_f"
    assert spanned("cat", "cat_3") == "cat … cat_3"
    assert spanned("mul", "mul") == "mul"
    assert clipped("a_very_long_name_of_it", 9) == "a_ve…f_it"


# --- the graph
def test_the_graph_shows_regions_and_what_lies_outside(transformer: Explanation) -> None:
    words = texts(graph_svg(transformer))
    for line in (
        "Transformer(i64[4,12])", "1 reversible region, 24 couplings",
        "region 0 · 24 couplings (additive)",
        "embedding", "norm → head", "× 11", "attention_{0…10}", "↻ f32[4,12,16]", "● f32[4,12,16]",
        "solved from, backward",
    ):  # fmt: skip
        assert line in words, line
    assert "attention_5" not in words


def test_values_are_coloured_by_what_becomes_of_them(transformer: Explanation) -> None:
    svg = graph_svg(transformer)
    nodes = layout(transformer.regions[0], 90).nodes
    for action in ("save", "invert", "recompute"):
        drawn = svg.count(f"fill: {PALETTE[action]}; stroke: {PALETTE[f'{action}-edge']}")
        assert drawn == 1 + sum(n.line.action == action for n in nodes), "the legend's, and one each"


def test_the_pointer_tells_how_a_value_is_made(transformer: Explanation) -> None:
    titles = [t.text for t in ElementTree.fromstring(graph_svg(transformer)).iter(f"{SVG}title")]
    assert any(t and t.startswith("invert: add_1 <- add_3 - attention.1(add_2) (zoo.py:") for t in titles)
    assert titles[0] == "What revfx finds in Transformer: 1 reversible region, 24 couplings"


def test_two_regions_are_drawn_with_what_is_between() -> None:
    words = texts(graph_svg(revfx.explain(TwoStages(6), *images(32))))
    order = [words.index(w) for w in ("stem → chunk", "down → chunk", "relu → mean → head")]
    assert order == sorted(order) and words.count("× 3") == 2


def test_a_model_with_nothing_reversible_shows_why() -> None:
    words = texts(graph_svg(revfx.explain(Residual(6), torch.randn(2, 8))))
    assert "nothing reversible was found" in words and "× 6" in words and "× 5" in words
    assert "`add` can't be computed back: `relu` maps all negative numbers" in words


def test_refusals_that_differ_in_numbers_are_told_once() -> None:
    found = alike([Refusal("`a_1` is", "add", "m.py:1"), Refusal("`a_22` is", "add", "m.py:1"), Refusal("x", "f", "")])
    assert found == [(Refusal("`a` is", "add", "m.py:1"), 2), (Refusal("x", "f", ""), 1)]


def test_large_models_say_what_is_not_drawn() -> None:
    words = texts(graph_svg(explained(chain(300, distinct=True))))
    assert f"{300 - MOST_IN_REGION} more values not drawn" in words
    words = texts(graph_svg(explained(*[chain(2)] * (MOST_REGIONS + 2))))
    assert "2 more regions not drawn" in words
    assert "v_{0…4999}" in texts(graph_svg(explained(chain(5000))))


def test_names_mean_nothing_to_the_picture() -> None:
    odd = ValueLine('<b>$x^2$ & id="n"', "f32[1]", "save", '"><script>', "<m>.py:1", 0, 4)
    region = replace(chain(2), values=(odd,), module="a<b>", before=("<i>",))
    words = texts(graph_svg(replace(explained(region), model="Net<T>&$")))
    assert {"Net<T>&$(f32[8])", "<i>", '<b>$x^2$ & id="n"'} <= set(words)


# --- memory
def timeline(*live: int) -> Timeline:
    return Timeline(live, len(live) // 2, live[len(live) // 2 - 1], 10, ((1, "forward 0 0"),))


def test_memory_over_time_names_ways_peaks_and_units(transformer: Explanation) -> None:
    words = texts(memory_svg(transformer))
    plain, ours = transformer.way("plain"), transformer.way("revfx")
    assert plain and ours and plain.peak and ours.peak and plain.peak > 4 * ours.peak
    assert f"plain {plain.peak / 2**10:.1f} KiB" in words or f"plain {plain.peak / 2**20:.1f} MiB" in words
    assert words.count(f"revfx {ours.peak / 2**10:.1f} KiB") == 2, "in both panels"
    assert {"forward", "backward", "revfx alone, enlarged"} <= set(words)
    assert any(w.startswith("operations of the step: ") and "(plain)" in w and "(revfx)" in w for w in words)


def test_a_small_difference_needs_no_second_panel() -> None:
    ways = Usage("plain", 4, 9, timeline=timeline(1, 4, 9, 2)), Usage("revfx", 4, 8, timeline=timeline(1, 4, 8, 2))
    words = texts(memory_svg(explained(ways=ways)))
    assert {"plain 9 B", "revfx 8 B", "B"} <= set(words) and "revfx alone, enlarged" not in words


def test_peaks_survive_the_thinning_of_long_timelines() -> None:
    live = [1] * 100_000
    live[77_777] = 5 * 2**30
    assert max(thinned(timeline(*live), 0.3)[1]) == 5 * 2**30 and len(thinned(timeline(*live), 0.3)[0]) < 1000
    words = texts(memory_svg(explained(ways=(Usage("plain", 1, 5 * 2**30, timeline=timeline(*live)),))))
    assert {"plain 5.00 GiB", "GiB"} <= set(words)


def test_without_a_timeline_there_is_no_picture_of_memory() -> None:
    with pytest.raises(RevfxError, match="holds no timeline"):
        memory_svg(explained(chain(2)))


# --- as files
def test_the_same_explanation_gives_the_same_bytes(transformer: Explanation) -> None:
    for draw in (graph_svg, memory_svg):
        first = draw(transformer)
        with matplotlib.rc_context({"font.family": "monospace", "axes.linewidth": 5, "svg.fonttype": "path"}):
            assert draw(transformer) == first
        assert not re.search(r"<dc:date>|<dc:creator>|Matplotlib v", first)


def test_without_matplotlib_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, transformer: Explanation
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for draw in (graph_svg, memory_svg):
        with pytest.raises(RevfxError, match=rf"`{draw.__name__}` needs matplotlib: pip install 'revfx\[viz\]'"):
            draw(transformer)
