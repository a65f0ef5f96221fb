"""`revfx demo`: a convolutional RevNet learns handwritten digits twice from one seed, plainly and converted."""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import revfx
from revfx.bench.models import RevNet
from revfx.report.data import size
from revfx.report.progress import bar
from revfx.testing import gradients, measure_memory, relative_error


BATCH = 64
DIGITS = Path(__file__).parent / "data" / "digits.pt"


@dataclass(frozen=True)
class Trained:
    """One run: bytes kept after the forward and at the peak of a step, median seconds of a step, the share of test
    digits named rightly after each epoch, and the loss of the last one.
    """

    kept: int
    peak: int
    seconds: float
    right: tuple[float, ...]
    loss: float


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return images (N, 3, 8, 8) and labels to train with, then to test with: every fourth of 1,797 scans."""
    held = torch.load(DIGITS, weights_only=True)
    x, y = held["images"].float().div(16).unsqueeze(1).expand(-1, 3, -1, -1), held["labels"].long()
    test = torch.arange(len(x)) % 4 == 0
    return x[~test], y[~test], x[test], y[test]


def make(depth: int) -> nn.Module:
    """Return the model of one seed: `depth` couplings, each of two residual functions."""
    torch.manual_seed(0)
    return RevNet(depth, channels=16)


def demo(epochs: int, depth: int, exact: bool, save: str, as_json: bool) -> int:
    """Train, print a table, and return 0 if both runs learn the digits and the converted one takes less memory, else 1.

    `save` is the page to write: .html, .svg or .json.
    """
    x, y, x_test, y_test = digits()
    models = {"plain": make(depth), "revfx": revfx.convert(make(depth), exact=exact)}
    torch.set_num_threads(1)  # small images gain nothing by more, and one thread repeats
    with bar(epochs * (len(x) // BATCH) + 2, "training") as advance:
        apart = max_difference(models["revfx"], x[:BATCH], y[:BATCH])
        runs = train(models, x, y, x_test, y_test, epochs, advance)
        advance("explaining")
        found = revfx.explain(make(depth), x[:BATCH], loss=lambda out: F.cross_entropy(out, y[:BATCH]))
        found.save(save)
        advance()
    learnt = min(run.right[-1] for run in runs.values()) > 0.9
    flat = runs["revfx"].peak < 0.6 * runs["plain"].peak
    if as_json:
        print(json.dumps({"runs": {n: asdict(r) for n, r in runs.items()}, "gradients": apart, "saved": save}))
    else:
        print(table(runs, apart, len(x), depth))
        print(f"saved {save}: what was found, and memory over one step")
    return 0 if learnt and flat else 1


class Run:
    """A model in training, with what has come of it so far."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, steps: int) -> None:
        self.memory = measure_memory(lambda: F.cross_entropy(model(x), y))
        model.zero_grad()
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 1e-2, total_steps=steps)
        self.spent: list[float] = []
        self.right: list[float] = []
        self.losses: list[float] = []

    def step(self, x: Tensor, y: Tensor) -> None:
        """Take one step of gradient descent."""
        start = time.perf_counter()
        loss = F.cross_entropy(self.model(x), y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.spent.append(time.perf_counter() - start)
        self.losses.append(loss.item())

    @torch.no_grad()
    def test(self, x: Tensor, y: Tensor) -> None:
        """Record the share of digits that are named rightly."""
        self.model.eval()
        self.right.append((self.model(x).argmax(1) == y).float().mean().item())
        self.model.train()

    def result(self, epoch: int) -> Trained:
        """Return what came of it; an epoch has so many steps."""
        loss, seconds = statistics.mean(self.losses[-epoch:]), statistics.median(self.spent)
        return Trained(self.memory.kept, self.memory.peak, seconds, tuple(self.right), loss)


def train(
    models: dict[str, nn.Module], x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor, epochs: int, advance: Any
) -> dict[str, Trained]:
    """Train all models, which take their steps in turn on the same batches, and return what came of each, by name."""
    steps = len(x) // BATCH
    runs = {name: Run(model, x[:BATCH], y[:BATCH], epochs * steps) for name, model in models.items()}
    order = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=order)[: steps * BATCH].view(-1, BATCH):
            for run in runs.values():
                run.step(x[batch], y[batch])
            advance()
        for run in runs.values():
            run.test(x_test, y_test)
    return {name: run.result(steps) for name, run in runs.items()}


def max_difference(converted: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the largest relative difference between gradients with regenerated activations and with stored ones."""
    got = gradients(converted, [x], lambda out: F.cross_entropy(out, y))
    want = gradients(revfx.testing.stored(converted), [x], lambda out: F.cross_entropy(out, y))
    pairs = [(got[name], w) for name, w in want.items()]
    return max(relative_error(g, w) for g, w in pairs if g is not None and w is not None)


def table(runs: dict[str, Trained], apart: float, images: int, depth: int) -> str:
    """Format the result as text."""
    plain, ours = runs["plain"], runs["revfx"]
    lines = [f"a RevNet of {depth} couplings, {len(plain.right)} epochs of {images} handwritten digits"]
    lines.append(f"{'':28}{'plain':>14}{'revfx':>14}")
    for name, a, b, ratio in (
        ("peak memory of a step", size(plain.peak), size(ours.peak), f"{plain.peak / ours.peak:.1f} x less"),
        ("kept after the forward", size(plain.kept), size(ours.kept), f"{plain.kept / ours.kept:.1f} x less"),
        ("time of a step", f"{plain.seconds * 1e3:.1f} ms", f"{ours.seconds * 1e3:.1f} ms",
         f"{ours.seconds / plain.seconds:.2f} x as long"),
        ("loss in the last epoch", f"{plain.loss:.4f}", f"{ours.loss:.4f}", ""),
        *((f"test digits right, epoch {i + 1}", f"{a:.2%}", f"{b:.2%}", "")
          for i, (a, b) in enumerate(zip(plain.right, ours.right, strict=True))),
    ):  # fmt: skip
        lines.append(f"{name:28}{a:>14}{b:>14}   {ratio}".rstrip())
    lines.append(f"gradients differ from those of stored activations by {apart:.1e} (relative, the worst)")
    return "\n".join(lines)
