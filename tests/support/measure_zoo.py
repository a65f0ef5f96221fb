"""Prints what models as their authors wrote them take within budgets of memory.

`python tests/support/measure_zoo.py [NAME...]`: a row for each model of `tests/system/test_zoo_budgets.py`: the time
and the peak of a plain step, and for each budget the peak and the time as parts of them. Steps are taken in turn; the
time is the median of the ratios. Set MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592
MALLOC_TOP_PAD_=268435456, lest page faults be compared.
"""

from __future__ import annotations

import copy
import math
import sys
import time
import warnings
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from fit_models import equal
from torch import nn


sys.path.append(str(Path(__file__).parents[1] / "system"))
from test_zoo_budgets import MODELS, SHARES, Made, trained, trained_within

import revfx


SECONDS, LEAST_ROUNDS, WARM_UPS = 6.0, 7, 2


def times(made: Made, budgets: list[float | None]) -> list[list[float]]:
    """Return the seconds of steps within budgets (None: plain), which are taken in turn."""
    runs: list[tuple[nn.Module, Any]] = []
    for memory in budgets:
        model = copy.deepcopy(made.model).train()
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        runs.append((model, model if memory is None else revfx.convert(model, memory=memory)))
    given, found = made.draw(), [list[float]() for _ in budgets]
    end, rounds = time.perf_counter() + SECONDS, 0
    while rounds < LEAST_ROUNDS or time.perf_counter() < end:
        for (model, run), mine in zip(runs, found, strict=True):
            model.zero_grad(set_to_none=False)
            torch.manual_seed(rounds)
            np.random.seed(rounds)
            start = time.perf_counter()
            made.loss(run(**given)).backward()
            mine.append(time.perf_counter() - start)
        rounds += 1
    return [mine[WARM_UPS:] for mine in found]


def row(name: str) -> str:
    """Return the row of a model."""
    made = MODELS[name]()
    want, peaks = trained(made)
    most = max(peaks)
    budgets, cells = list[float | None]([None]), list[str]()
    for asked in SHARES:
        (got, peaks), share = trained_within(made, asked, most)
        assert equal(got, want), f"{name} at {asked}: not the plain model's bits"
        budgets.append(share if share == asked else math.ceil(share * most))
        cells.append(f"{max(peaks[1:]) / most:.2f}")
    plain, *others = times(made, budgets)
    for n, mine in enumerate(others):
        cells[n] += f" / {median(a / b for a, b in zip(mine, plain, strict=True)):.2f}"
    return f"| {name} | {1e3 * median(plain):.0f} ms, {most / 2**20:.1f} MiB | {' | '.join(cells)} |"


def main(names: list[str]) -> None:
    """Print the rows of some models, or of all."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"| model | plain | {' | '.join(f'{share:.0%}' for share in SHARES)} |\n|{'---|' * (2 + len(SHARES))}")
    for name in names or MODELS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the libraries, and of layers that are left out
            print(row(name), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
