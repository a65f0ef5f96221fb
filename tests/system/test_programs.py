"""Random programs leave what plain autograd leaves, or are refused: never a silently wrong gradient.

`python -m pytest tests -m fuzz --programs 10000` runs many more, spread over processes by `-n`; its terminal summary
names the seed, and `--programs-seed` repeats it.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from programs_report import PROPERTY
from programs_survey import WAYS, survey


PART = {"inductor": 5, "aot_eager": 25}  # programs in one part of a long run, where it is not 100
pytestmark = [
    pytest.mark.filterwarnings("ignore:Using `torch.compile"),
    pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisWarning"),
    pytest.mark.filterwarnings("ignore:Initializing zero-element tensors"),
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "part" in metafunc.fixturenames:
        total: int = metafunc.config.option.programs
        parts: list[tuple[str, int, int]] = []
        for name, way in WAYS.items():
            count, size = round(total * way.share), PART.get(name, 100)
            parts += [(name, k, min(size, count - at)) for k, at in enumerate(range(0, count, size))]
        metafunc.parametrize("part", parts, ids=[f"{name} {k}" for name, k, _ in parts])


@pytest.mark.parametrize("way", WAYS)
def test_random_programs_train_as_plain_ones_do(way: str) -> None:
    figures = survey(WAYS[way], WAYS[way].quick)
    assert not figures.failures, "\n".join(figures.failures)
    assert figures.found >= figures.programs / 3, figures.kinds


@pytest.mark.fuzz
def test_many_random_programs(
    part: tuple[str, int, int], pytestconfig: pytest.Config, record_property: Callable[[str, object], None]
) -> None:
    way, number, count = part
    seed = pytestconfig.option.programs_seed + number
    figures = survey(WAYS[way], count, seed)
    counts = {"programs": figures.programs, "found": figures.found, **figures.kinds}
    record_property(PROPERTY, {"way": way, "seed": seed, "counts": counts})
    assert not figures.failures, "\n".join(figures.failures)
