"""What the README shows runs, and prints what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch


README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_example_prints_the_memory_that_the_readme_shows(capsys: pytest.CaptureFixture[str]) -> None:
    code, shown = re.findall(r"```(?:python)?\n(.*?)```", README.split("## What it does")[1], re.DOTALL)[:2]
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    label = re.compile(r"(\d+ couplings, \w+): +([\d.]+) MiB")
    want, got = dict(label.findall(shown)), dict(label.findall(printed))
    assert list(got) == list(want)
    if torch.__version__.startswith("2.13."):  # the version that the README's figures were taken with
        assert all(abs(float(got[k]) - float(v)) < 0.02 * float(v) for k, v in want.items())
    assert len({v for k, v in got.items() if "revfx" in k}) == 1, "the same at every depth"
