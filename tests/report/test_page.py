"""The page of an explanation, and the cell of a notebook."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from zoo import Transformer

import revfx
from revfx.errors import Reason, Refusal, RevfxError
from revfx.report.data import RegionInfo, Usage, ValueLine
from revfx.report.explanation import Explanation
from revfx.report.html import MAX_REFUSAL_ROWS, fragment, page
from revfx.report.memory import DARK, PALETTE


ODD = "</script><img src=x onerror=alert(1)>\"'&`$"
VOID = {"meta", "br"}


@pytest.fixture(scope="module")
def transformer() -> Explanation:
    return revfx.explain(Transformer(12), torch.randint(0, 20, (4, 12)))


def region(values: int, name: str = "v") -> RegionInfo:
    lines = tuple(
        ValueLine(f"{name}_{i}", "f32[8]", "invert" if i % 2 else "recompute", "how", "m.py:1", i)
        for i in range(values)
    )
    return RegionInfo("net", "m.py:1", "m.py:2", "additive", 3, 4, ("f32[8]",), (), 2048, 2, 4096, False, lines)


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


def test_the_page_has_everything_in_one_file(transformer: Explanation) -> None:
    found = Elements(page(transformer))
    tags = [tag for tag, _ in found.seen]
    assert tags.count("svg") == 1 and tags.count("script") == 0 and tags.count("h1") == 1
    assert [tag for tag in tags if re.fullmatch("h[1-6]", tag)] == ["h1"] + ["h2"] * 4, "no level is left out"
    assert ("html", {"lang": "en"}) in found.seen and tags.count("title") == 2
    for words in (
        "Transformer (i64[4,12])", f"1 reversible region, {transformer.couplings} couplings.", "Peak memory of a step",
        "Left as it was", f"→ {transformer.refusals[0].kind.remedy.partition('`')[0].strip()}", "bit for bit",
        next(v.how for v in transformer.regions[0].values if v.action == "invert"),
    ):  # fmt: skip
        assert words in found.text, words


def test_nothing_is_asked_for_from_elsewhere(transformer: Explanation) -> None:
    source = page(transformer)
    references = [
        v for _, given in Elements(source).seen for k, v in given.items() if k in ("src", "href", "xlink:href")
    ]
    assert all(v and v.startswith("#") for v in references) and "@import" not in source
    hosts = set(re.findall(r"https?://[^/\s]+", source))
    assert hosts == {"http://www.w3.org"}, "in the names of SVG's own namespaces"
    assert "default-src 'none'" in source and "script-src" not in source


def test_names_of_parts_are_used_once(transformer: Explanation) -> None:
    ids = [given["id"] for _, given in Elements(page(transformer)).seen if "id" in given]
    assert ids and len(ids) == len(set(ids))


def test_what_comes_from_the_model_is_never_code() -> None:
    line = ValueLine(ODD, ODD, "save", ODD, ODD, 0)
    odd = replace(region(1), module=ODD, first=ODD, kind=ODD, streams=(ODD,), values=(line,))
    e = Explanation(
        ODD, (ODD,), (odd,), (Refusal(Reason.NO_RULE, (ODD,), ODD, ODD),), (Usage(ODD, 1),), ((odd,),),
        (ODD,), (ODD,), (ODD,),
    )  # fmt: skip
    for source in (page(e), fragment(e)):
        found = Elements(source)
        tags = {tag for tag, _ in found.seen}
        assert "img" not in tags and not any(k.startswith("on") for _, given in found.seen for k in given)
        assert "script>" not in source
        assert ODD in "".join(found.words)


def test_both_themes_have_every_colour_and_enough_contrast(transformer: Explanation) -> None:
    assert PALETTE.keys() == DARK.keys()
    source = page(transformer)
    pictures = "".join(re.findall(r"<svg.*?</svg>", source, re.DOTALL))
    assert not re.search(r": #[0-9a-f]{6}", pictures), "a colour that has no dark form"
    for theme in (PALETTE, DARK):
        pairs = [("ink", "paper"), ("muted", "paper"), ("revfx", "paper"), ("plain", "paper"), ("ink", "outside")]
        pairs += [("advice", "paper")]
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
    ways = Usage("plain", 1000, 4000, 10), Usage("fitted", 500, 2000, 13), Usage("revfx", 100, 1000, 13)
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
        "Net", (), (one,), (), graphs=((one,), ()), breaks=("a print",),
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
    many = tuple(Refusal(Reason.NO_RULE, (f"op{i}",), "m.py:1", f"because {i}th") for i in range(MAX_REFUSAL_ROWS + 3))
    source = page(Explanation("Net", (), (region(2),), many))
    assert "3 more refusals not shown" in source and f"because {MAX_REFUSAL_ROWS}th" not in source


def test_without_matplotlib_the_page_says_what_to_install_and_a_notebook_shows_text(
    monkeypatch: pytest.MonkeyPatch, transformer: Explanation, tmp_path: Path
) -> None:
    shown = transformer._repr_html_()  # pyright: ignore[reportPrivateUsage] as a notebook does
    assert shown == fragment(transformer) and shown.count("<svg") == 1
    assert "<html" not in shown and "body" not in re.sub("tbody", "", shown)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(RevfxError, match=r"pip install 'revfx\[viz\]'"):
        transformer.save(tmp_path / "x.html")
    words = Elements(fragment(transformer)).text
    assert "1 reversible region" in words and "measured" not in words and "<svg" not in fragment(transformer)
