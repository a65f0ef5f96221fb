"""What the README shows runs, and prints what it says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import revfx


README = (Path(__file__).parent.parent.parent / "README.md").read_text()


def test_the_example_prints_the_memory_that_the_readme_shows(capsys: pytest.CaptureFixture[str]) -> None:
    code, shown = re.findall(r"```(?:python)?\n(.*?)```", README.split("## What it does")[1], re.DOTALL)[:2]
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    label = re.compile(r"(\d+ couplings, \w+): +([\d.]+) MiB")
    want, got = dict(label.findall(shown)), dict(label.findall(printed))
    assert list(got) == list(want)
    if torch.__version__.startswith("2.13."):  # the version that the README's figures were taken with
        assert all(abs(float(got[k]) - float(v)) < 0.02 * float(v) for k, v in want.items())
    peaks = {k: float(v) for k, v in got.items()}
    growth = [peaks[f"64 couplings, {way}"] - peaks[f"4 couplings, {way}"] for way in ("revfx", "plain")]
    assert growth[0] < 0.02 * growth[1], "codes alone"


def test_what_explain_prints_is_what_the_readme_shows() -> None:
    code = re.findall(r"```python\n(.*?)```", README.split("## What it does")[1], re.DOTALL)[0]
    names: dict[str, Any] = {}
    exec(compile(code.split("x = torch.randn")[0], "README.md", "exec"), names)
    shown = re.findall(r"```(?:python)?\n(.*?)```", README.split("## See what it finds")[1], re.DOTALL)[1].splitlines()
    printed = str(revfx.explain(names["Net"](16), torch.randn(4096, 128))).splitlines()
    place = re.compile(r"\S+:\d+")  # the lines of another file
    assert [place.sub("", line) for line in printed] == [place.sub("", line) for line in shown]
