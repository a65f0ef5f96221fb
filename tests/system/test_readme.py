"""The code in the README and in docs/ runs, and prints what stands below it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import revfx
from revfx.rules import registered, unregister_inverse


ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)
REVERSIBLE = (ROOT / "docs" / "reversible.md").read_text()
PEAK = re.compile(r"^(.*): +([\d.]+) MiB$", re.MULTILINE)
MAX_README_LINES = 150


class Flow(nn.Module):
    """An affine coupling, which returns the logarithm of its determinant as well."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 128))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x.chunk(2, 1)
        s, t = self.f(a).chunk(2, 1)
        return torch.cat((a, b * s.tanh().exp() + t), 1), s.tanh().sum(1)


def example(page: str) -> dict[str, Any]:
    """The names that the first example of a page defines, before it makes inputs."""
    names: dict[str, Any] = {}
    exec(compile(BLOCKS.findall(page)[0][1].split("x = torch.randn")[0], "page", "exec"), names)
    return names


@pytest.fixture
def rules_as_they_were() -> Iterator[None]:
    """Take back the rules that a page registers: compile caches are bypassed while there are such."""
    before = set(registered())
    yield
    unregister_inverse(*set(registered()) - before)


@pytest.mark.usefixtures("rules_as_they_were")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_runs_and_prints_the_memory_that_is_shown(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {
        "revfx": revfx, "torch": torch, "Net": example(REVERSIBLE)["Net"],
        "model": nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)), "flow": Flow(), "x": torch.randn(4, 8),
    }  # fmt: skip
    printed = ""
    for language, block in BLOCKS.findall(page.read_text()):
        if language == "python":
            exec(compile(block, page.name, "exec"), names)
            printed = capsys.readouterr().out
        elif not language and PEAK.search(block):
            shown, found = dict(PEAK.findall(block)), dict(PEAK.findall(printed))
            assert found.keys() == shown.keys()
            if torch.__version__.startswith("2.13."):  # the version of the figures
                assert {k for k in shown if abs(float(found[k]) / float(shown[k]) - 1) > 0.02} == set()


def test_explain_prints_the_page_on_reversible_networks() -> None:
    shown = BLOCKS.findall(REVERSIBLE.split("## See what it finds")[1])[1][1].splitlines()
    printed = str(revfx.explain(example(REVERSIBLE)["Net"](16), torch.randn(4096, 128))).splitlines()
    place = re.compile(r"\S+:\d+")  # the lines of another file
    assert [place.sub("", line) for line in printed] == [place.sub("", line) for line in shown]


def test_links_lead_to_files() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_readme_is_short() -> None:
    assert len(PAGES[0].read_text().splitlines()) <= MAX_README_LINES
