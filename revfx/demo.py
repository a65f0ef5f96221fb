"""`revfx demo`: a convolutional RevNet learns handwritten digits twice from one seed, plainly and converted."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import revfx
from revfx.bench.models import RevNet
from revfx.report.progress import bar
from revfx.testing import gradients, measure_memory, relative_error, store_activations
from revfx.units import size


BATCH = 64
DIGITS = Path(__file__).parent / "data" / "digits.pt"
Data = tuple[Tensor, Tensor, Tensor, Tensor]
Results = dict[str, dict[str, Any]]


def digits() -> Data:
    """Return images (N, 3, 8, 8) and labels to train with, then to test with: every fourth of 1,797 scans."""
    held = torch.load(DIGITS, weights_only=True)
    x, y = held["images"].float().div(16).unsqueeze(1).expand(-1, 3, -1, -1), held["labels"].long()
    test = torch.arange(len(x)) % 4 == 0
    return x[~test], y[~test], x[test], y[test]


def make(depth: int) -> nn.Module:
    """Return the model of one seed: `depth` couplings, each of two residual functions."""
    torch.manual_seed(0)
    return RevNet(depth, channels=16)


def main(args: argparse.Namespace) -> int:
    """Train, print a table, and return 0 if both runs learn the digits and the converted one takes less memory."""
    data = x, y, *_ = digits()
    models = {"plain": make(args.depth), "revfx": revfx.convert(make(args.depth))}
    torch.set_num_threads(1)  # small images gain nothing by more, and one thread repeats
    with bar(args.epochs * (len(x) // BATCH) + 2, "training") as advance:
        apart = max_difference(models["revfx"], x[:BATCH], y[:BATCH])
        runs = train(models, data, args.epochs, advance)
        advance("explaining")
        found = revfx.explain(make(args.depth), x[:BATCH], loss=lambda out: F.cross_entropy(out, y[:BATCH]))
        found.save(args.save)
        advance()
    learnt = min(run["right"][-1] for run in runs.values()) > 0.9
    flat = runs["revfx"]["peak"] < 0.6 * runs["plain"]["peak"]
    if args.json:
        print(json.dumps({"runs": runs, "gradients": apart, "saved": args.save}))
    else:
        print(table(runs, apart, len(x), args.depth))
        print(f"saved {args.save}: what was found, and memory over one step")
    return 0 if learnt and flat else 1


class Run:
    """A model in training, with what has come of it so far."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, steps: int) -> None:
        self.memory = measure_memory(lambda: F.cross_entropy(model(x), y))
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 1e-2, total_steps=steps)
        self.spent, self.right, self.losses = list[float](), list[float](), list[float]()

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

    def result(self) -> dict[str, Any]:
        """Return the bytes, the median of the seconds, all shares, and the mean loss of the last epoch."""
        last = self.losses[-(len(self.losses) // len(self.right)) :]
        seconds, loss = statistics.median(self.spent), statistics.mean(last)
        return {**asdict(self.memory), "seconds": seconds, "right": self.right, "loss": loss}


def train(models: dict[str, nn.Module], data: Data, epochs: int, advance: Any) -> Results:
    """Train all models, which take their steps in turn on the same batches, and return what came of each, by name."""
    x, y, x_test, y_test = data
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
    return {name: run.result() for name, run in runs.items()}


def max_difference(converted: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the largest relative difference between gradients with regenerated activations and with stored ones."""
    got = gradients(converted, [x], lambda out: F.cross_entropy(out, y))
    with store_activations():
        want = gradients(converted, [x], lambda out: F.cross_entropy(out, y))
    pairs = zip(got.values(), want.values(), strict=True)
    return max(relative_error(g, w) for g, w in pairs if g is not None and w is not None)


def table(runs: Results, apart: float, images: int, depth: int) -> str:
    """Format the result as text."""
    plain, ours = runs["plain"], runs["revfx"]
    rows = [("", "plain", "revfx", "")]
    for name, field in (("peak memory of a step", "peak"), ("kept after the forward", "kept")):
        a, b = plain[field], ours[field]
        rows.append((name, size(a), size(b), f"{a / b:.1f} x less"))
    a, b = plain["seconds"], ours["seconds"]
    rows.append(("time of a step", f"{a * 1e3:.1f} ms", f"{b * 1e3:.1f} ms", f"{b / a:.2f} x as long"))
    rows.append(("loss in the last epoch", f"{plain['loss']:.4f}", f"{ours['loss']:.4f}", ""))
    for epoch, (a, b) in enumerate(zip(plain["right"], ours["right"], strict=True), 1):
        rows.append((f"test digits right, epoch {epoch}", f"{a:.2%}", f"{b:.2%}", ""))
    first = f"a RevNet of {depth} couplings, {len(plain['right'])} epochs of {images} handwritten digits"
    lines = (f"{name:28}{a:>14}{b:>14}   {ratio}".rstrip() for name, a, b, ratio in rows)
    last = f"gradients differ from those of stored activations by {apart:.1e} (relative, the worst)"
    return "\n".join((first, *lines, last))
