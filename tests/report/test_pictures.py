"""The picture of memory over a step: its words and lines, and SVG that is well-formed and the same each time."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import pytest
import torch
from zoo import Transformer

import revfx
from revfx.errors import RevfxError
from revfx.report.data import Usage
from revfx.report.explanation import Explanation
from revfx.report.memory import memory_svg, thinned


SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def transformer() -> Explanation:
    return revfx.explain(Transformer(12), torch.randint(0, 20, (4, 12)))


def texts(svg: str) -> list[str]:
    """What is written in a picture; it is parsed, so it is well-formed."""
    return ["".join(t.itertext()).strip() for t in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def explained(*ways: Usage) -> Explanation:
    return Explanation("Net", ("f32[8]",), (), (), ways)


def step(way: str, *live: int) -> Usage:
    """A step with these bytes after its operations, of which the first half are the forward's."""
    return Usage(way, live[len(live) // 2 - 1], max(live), live=live, backward=len(live) // 2)


def test_memory_over_time_names_ways_peaks_and_units(transformer: Explanation) -> None:
    words = texts(memory_svg(transformer))
    plain, ours = transformer.way("plain"), transformer.way("revfx")
    assert plain and ours and plain.peak and ours.peak and plain.peak > 4 * ours.peak
    assert f"plain {plain.peak / 2**10:.1f} KiB" in words or f"plain {plain.peak / 2**20:.1f} MiB" in words
    assert words.count(f"revfx {ours.peak / 2**10:.1f} KiB") == 2, "in both panels"
    assert {"forward", "backward", "revfx alone, enlarged"} <= set(words)
    assert any(w.startswith("operations of the step: ") and "(plain)" in w and "(revfx)" in w for w in words)


def test_a_small_difference_needs_no_second_panel() -> None:
    words = texts(memory_svg(explained(step("plain", 1, 4, 9, 2), step("revfx", 1, 4, 8, 2))))
    assert {"plain 9 B", "revfx 8 B", "B"} <= set(words) and "revfx alone, enlarged" not in words


def test_peaks_survive_the_thinning_of_long_timelines() -> None:
    live = [1] * 100_000
    live[77_777] = 5 * 2**30
    assert max(thinned(step("plain", *live), 0.3)[1]) == 5 * 2**30 and len(thinned(step("plain", *live), 0.3)[0]) < 1000
    words = texts(memory_svg(explained(step("plain", *live))))
    assert {"plain 5.00 GiB", "GiB"} <= set(words)


def test_without_a_timeline_there_is_no_picture_of_memory() -> None:
    with pytest.raises(RevfxError, match="no training step was simulated"):
        memory_svg(explained())


def test_the_picture_is_saved_as_svg(transformer: Explanation, tmp_path: Path) -> None:
    transformer.save(tmp_path / "x.svg")
    assert (tmp_path / "x.svg").read_text(encoding="utf-8") == memory_svg(transformer)


def test_the_same_explanation_gives_the_same_bytes(transformer: Explanation) -> None:
    first = memory_svg(transformer)
    with matplotlib.rc_context({"font.family": "monospace", "axes.linewidth": 5, "svg.fonttype": "path"}):
        assert memory_svg(transformer) == first
    assert not re.search(r"<dc:date>|<dc:creator>|Matplotlib v", first)


def test_names_mean_nothing_to_the_picture() -> None:
    words = texts(memory_svg(Explanation("Net<T>&$x^2$", (), (), (), (step("plain", 1, 4, 9, 2),))))
    assert "Memory of one training step: Net<T>&$x^2$" in words


def test_without_matplotlib_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, transformer: Explanation
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(RevfxError, match=r"without matplotlib. Run pip install 'revfx\[viz\]'"):
        memory_svg(transformer)
