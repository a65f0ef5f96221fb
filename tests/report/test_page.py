"""The page of an explanation, as text and as a browser sees it; and what a notebook shows."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from browser import visit
from zoo import Transformer

import revfx
from revfx.errors import Refusal, RevfxError
from revfx.report.data import GraphInfo, RegionInfo, Usage, ValueLine
from revfx.report.explanation import Explanation
from revfx.report.figures import DARK, PALETTE
from revfx.report.html import MOST_REFUSALS, MOST_ROWS, fragment, page


ODD = "</script><img src=x onerror=alert(1)>\"'&`$"
VOID = {"meta", "input", "br"}


@pytest.fixture(scope="module")
def transformer() -> Explanation:
    return revfx.explain(Transformer(12), torch.randint(0, 20, (4, 12)))


def region(values: int, name: str = "v") -> RegionInfo:
    lines = tuple(
        ValueLine(f"{name}_{i}", "f32[8]", "invert" if i % 2 else "recompute", "how", "m.py:1", i, 1024 * i)
        for i in range(values)
    )
    return RegionInfo("net", "m.py:1", "m.py:2", "additive", 3, 4, ("f32[8]",), (), 2048, 2, 4096, 1e-7, lines)


class Elements(HTMLParser):
    """Notes the tags of a page, their attributes and the text in them, and that they nest."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(source)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


# --- as text
def test_the_page_has_everything_in_one_file(transformer: Explanation) -> None:
    found = Elements(page(transformer))
    tags = [tag for tag, _ in found.seen]
    assert tags.count("svg") == 2 and tags.count("script") == 1 and tags.count("h1") == 1
    assert [tag for tag in tags if re.fullmatch("h[1-6]", tag)] == ["h1"] + ["h2"] * 6, "no level is left out"
    assert ("html", {"lang": "en"}) in found.seen and tags.count("title") >= 3
    for words in (
        "Transformer (i64[4,12])", "1 reversible region, 24 couplings.", "Peak memory of a step", "checkpoint",
        "Left as it was", "→ give it one by revfx.register_inverse", "add_21 <- add_23 - attention.11(add_22)",
    ):  # fmt: skip
        assert words in found.text, words
    rows = page(transformer).count("<tr><td>")
    values = transformer.regions[0]
    assert rows >= len(values.values) + len(values.entry) == 53


def test_nothing_is_asked_for_from_elsewhere(transformer: Explanation) -> None:
    source = page(transformer)
    references = [
        v for _, given in Elements(source).seen for k, v in given.items() if k in ("src", "href", "xlink:href")
    ]
    assert all(v and v.startswith("#") for v in references) and "@import" not in source
    hosts = set(re.findall(r"https?://[^/\s]+", source))
    assert hosts == {"http://www.w3.org"}, "in the names of SVG's own namespaces"
    assert "default-src 'none'" in source


def test_names_of_parts_are_used_once(transformer: Explanation) -> None:
    ids = [given["id"] for _, given in Elements(page(transformer)).seen if "id" in given]
    assert len(ids) == len(set(ids)) and {"search", "count", "rows", "values"} <= set(ids)


def test_what_comes_from_the_model_is_never_code() -> None:
    line = ValueLine(ODD, ODD, "save", ODD, ODD, 0, 1, (ODD,), (ODD,))
    odd = replace(region(1), module=ODD, first=ODD, kind=ODD, streams=(ODD,), values=(line,), before=(ODD,))
    e = Explanation(
        ODD, (ODD,), (odd,), (Refusal(ODD, ODD, ODD),), (Usage(ODD, 1),), None, (GraphInfo(0, (odd,)),),
        (ODD,), (ODD,), (ODD,),
    )  # fmt: skip
    for source in (page(e), fragment(e)):
        found = Elements(source)
        tags = {tag for tag, _ in found.seen}
        assert "img" not in tags and not any(k.startswith("on") for _, given in found.seen for k in given)
        assert source.count("</script>") == source.count("<script>") <= 1
        assert ODD in "".join(found.words)


def test_both_themes_have_every_colour_and_enough_contrast(transformer: Explanation) -> None:
    assert PALETTE.keys() == DARK.keys()
    source = page(transformer)
    pictures = "".join(re.findall(r"<svg.*?</svg>", source, re.DOTALL))
    assert not re.search(r": #[0-9a-f]{6}", pictures), "a colour that has no dark form"
    for theme in (PALETTE, DARK):
        pairs = [("ink", "paper"), ("muted", "paper"), ("revfx", "paper"), ("plain", "paper"), ("ink", "outside")]
        pairs += [(ink, kind) for kind in ("save", "invert", "recompute") for ink in ("ink", "muted", f"{kind}-edge")]
        for ink, ground in pairs:
            assert contrast(theme[ink], theme[ground]) >= 4.5, (ink, ground)


def contrast(a: str, b: str) -> float:
    """The ratio of two colours as WCAG defines it."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_figures_of_ways_stand_beside_the_plain_ones() -> None:
    ways = Usage("plain", 1000, 4000, 10), Usage("checkpoint", 500, 2000, 13), Usage("revfx", 100, 1000, 13)
    words = Elements(page(replace(Explanation("Net", (), (), ()), ways=ways))).text
    assert "4.0 × less" in words and "10.0 × less" in words and "1.30 × as many" in words
    assert "0.50 ×" in words and "0.25 ×" in words and "measured" not in words
    seen = (
        Usage("plain", 9, 9, 1, 3000, 6000, 1.0), Usage("revfx", 9, 9, 1, 1500, 2000, 1.5),
    )  # fmt: skip
    words = Elements(page(replace(Explanation("Net", (), (), ()), ways=seen))).text
    assert "3.0 × less" in words and "2.0 × less" in words and "1.50 × as long" in words


def test_advice_notes_graphs_and_breaks_are_shown() -> None:
    one = region(2)
    e = Explanation(
        "Net", (), (one,), (), graphs=(GraphInfo(0, (one,)), GraphInfo(1, ())), breaks=("a print",),
        advice=("do this",), notes=("not known",),
    )  # fmt: skip
    words = Elements(page(e)).text
    for text in (
        "graph 0: 1 region",
        "graph 1: 0 regions",
        "a print",
        "do this",
        "not known",
        "in 2 graphs, 3 couplings",
    ):
        assert text in words, text


def test_large_tables_are_cut_and_say_so() -> None:
    many = tuple(Refusal(f"because {i}th", f"op{i}", "m.py:1") for i in range(MOST_REFUSALS + 3))
    e = Explanation("Net", (), (region(MOST_ROWS + 7),), many)
    source = page(e)
    assert f"The first {MOST_ROWS:,} of {MOST_ROWS + 7:,} values" in source and "3 more refusals not shown" in source
    assert f">v_{MOST_ROWS - 1}<" in source and f"<td>v_{MOST_ROWS}<" not in source


def test_without_matplotlib_the_page_says_what_to_install_and_a_notebook_shows_text(
    monkeypatch: pytest.MonkeyPatch, transformer: Explanation, tmp_path: Path
) -> None:
    shown = transformer._repr_html_()  # pyright: ignore[reportPrivateUsage] as a notebook does
    assert shown == fragment(transformer) and shown.count("<svg") == 2
    assert "<html" not in shown and 'id="rows"' not in shown
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(RevfxError, match=r"pip install 'revfx\[viz\]'"):
        transformer.save(tmp_path / "x.html")
    words = Elements(fragment(transformer)).text
    assert "1 reversible region" in words and "measured" not in words and "<svg" not in fragment(transformer)


# --- in a browser
def rows(document: str) -> tuple[list[str], list[str]]:
    """The names in the table of values that are shown, and those that are hidden."""
    table = document.split('id="rows">')[1].split("</tbody>")[0]
    found = re.findall(r"<tr( hidden=\"\")?><td>(.*?)</td>", table)
    return [name for hidden, name in found if not hidden], [name for hidden, name in found if hidden]


def assert_quiet(log: str) -> None:
    assert not re.search(r"CONSOLE|Refused|Uncaught|ERR_", log), log


def test_a_browser_shows_all_values_and_has_nothing_to_say(transformer: Explanation, tmp_path: Path) -> None:
    transformer.save(tmp_path / "x.html")
    seen = visit(tmp_path / "x.html", tmp_path / "profile")
    assert len(rows(seen.document)[0]) == 53 and not rows(seen.document)[1]
    assert_quiet(seen.log)


def test_an_address_can_hold_a_search(transformer: Explanation, tmp_path: Path) -> None:
    transformer.save(tmp_path / "x.html")
    seen = visit(tmp_path / "x.html", tmp_path / "profile", "search=INVERT%20feed.3(")
    shown, hidden = rows(seen.document)
    assert shown == ["add_6"] and len(hidden) == 52
    assert ">1 of 53 values</output>" in seen.document
    assert_quiet(seen.log)
    none = visit(tmp_path / "x.html", tmp_path / "profile", "search=%3Cimg%20src%3Dx%3E")
    assert ">0 of 53 values</output>" in none.document and "<img" not in none.document
    assert_quiet(none.log)


def test_a_browser_sorts_by_numbers_and_by_names(tmp_path: Path) -> None:
    source = page(Explanation("Net", (), (region(12),), ()))
    clicks = "<script>for (const i of [5, 5]) document.querySelectorAll('#values button')[i].click()</script></body>"
    (tmp_path / "x.html").write_text(source.replace("</body>", clicks), encoding="utf-8")
    seen = visit(tmp_path / "x.html", tmp_path / "profile")
    assert rows(seen.document)[0] == [f"v_{i}" for i in range(11, -1, -1)]
    assert seen.document.count("aria-sort=") == 1 + source.count("aria-sort=")
    (tmp_path / "y.html").write_text(source.replace("</body>", clicks.replace("[5, 5]", "[5, 5, 0]")), encoding="utf-8")
    assert rows(visit(tmp_path / "y.html", tmp_path / "profile").document)[0] == [f"v_{i}" for i in range(12)]


@pytest.mark.deep
def test_thousands_of_values_are_searched_at_once(tmp_path: Path) -> None:
    source = page(Explanation("Net", (), (region(MOST_ROWS),), ()))
    timed = """<script>
    const box = document.getElementById("search"), start = performance.now();
    for (const text of ["v", "v_4", "v_49", ""]) {
      box.value = text;
      box.dispatchEvent(new Event("input"));
      document.body.getBoundingClientRect();
    }
    document.title = "took " + (performance.now() - start) / 4;
    </script></body>"""
    (tmp_path / "x.html").write_text(source.replace("</body>", timed), encoding="utf-8")
    seen = visit(tmp_path / "x.html", tmp_path / "profile")
    took = re.search(r"<title>took ([\d.]+)</title>", seen.document)
    assert took and float(took[1]) < 1000, "milliseconds for a letter, with room for a busy machine"
    assert len(rows(seen.document)[0]) == 500 and ">5,000 values, the first 500 shown</output>" in seen.document
    (tmp_path / "y.html").write_text(source, encoding="utf-8")
    assert rows(visit(tmp_path / "y.html", tmp_path / "profile", "search=v_4999").document)[0] == ["v_4999"]


def test_a_program_with_an_error_would_be_noticed(tmp_path: Path) -> None:
    """The tests above would say nothing if the browser's log did not."""
    (tmp_path / "x.html").write_text("<script>missing()</script>", encoding="utf-8")
    assert re.search("CONSOLE.*missing is not defined", visit(tmp_path / "x.html", tmp_path / "profile").log)
