"""A convolutional RevNet on handwritten digits: trained plainly and converted, from one seed, side by side.

The model below is ordinary PyTorch with BatchNorm: nothing in it knows of revfx. The converted run takes a
fraction of the activation memory, and is the plain one otherwise: every loss, and the weights in the end, are
the same to the last bit. At the end it draws a picture of both: losses, and memory over a step.

    python examples/revnet_digits.py            # a minute
    python examples/revnet_digits.py --short    # ten seconds
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from _report import Comparison, compare, mb, print_comparison, require
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import revfx


BATCH = 64


def residual(width: int) -> nn.Sequential:
    """Two pre-activated convolutions."""
    return nn.Sequential(
        nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1, bias=False),
    )  # fmt: skip


class Coupling(nn.Module):
    """`y1 = x1 + f(x2)`, `y2 = x2 + g(y1)` on the two halves of the channels; x: (B, width, H, W)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.f, self.g = residual(width // 2), residual(width // 2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, H, W)."""
        x1, x2 = x.chunk(2, dim=1)
        y1 = x1 + self.f(x2)
        y2 = x2 + self.g(y1)
        return torch.cat([y1, y2], dim=1)


class RevNet(nn.Module):
    """A stem, a stage of couplings at 8x8, a strided convolution, a stage at 4x4, and a linear head."""

    def __init__(self, width: int = 24, couplings: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.stage1 = nn.Sequential(*(Coupling(width) for _ in range(couplings)))
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False)
        self.stage2 = nn.Sequential(*(Coupling(2 * width) for _ in range(couplings)))
        self.norm = nn.BatchNorm2d(2 * width)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, 10) of images (B, 1, 8, 8)."""
        x = self.stage1(self.stem(x))
        x = self.stage2(self.down(x))
        return self.head(F.relu(self.norm(x)).mean(dim=(2, 3)))


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels to train with, then to test with: 1797 scans of 8x8 pixels, a quarter to test."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images / 16, labels, test_size=0.25, random_state=0, stratify=labels)
    x, x_test, y, y_test = (torch.as_tensor(p) for p in parts)
    return x.float().view(-1, 1, 8, 8), y, x_test.float().view(-1, 1, 8, 8), y_test


class Run:
    """A model with its optimiser; models made from one seed see the same batches."""

    def __init__(self, model: nn.Module, steps: int) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 2e-3, total_steps=steps)
        self.losses: list[float] = []
        self.seconds = 0.0

    def step(self, x: Tensor, y: Tensor) -> None:
        """Take one step of gradient descent."""
        start = time.perf_counter()
        loss = F.cross_entropy(self.model(x), y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.losses.append(loss.item())
        self.seconds += time.perf_counter() - start

    @torch.no_grad()
    def accuracy(self, x: Tensor, y: Tensor) -> float:
        """The share of images that are named rightly."""
        self.model.eval()
        right = (self.model(x).argmax(dim=1) == y).float().mean().item()
        self.model.train()
        return right


def make_runs(width: int, couplings: int, steps: int) -> tuple[Run, Run]:
    """Two runs from one seed: plain and converted."""
    models: list[nn.Module] = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(RevNet(width, couplings))
    return Run(models[0], steps), Run(revfx.convert(models[1]), steps)


def draw(runs: tuple[Run, Run], step: Comparison, file: Path) -> None:
    """Write a picture: the losses of both runs, and the memory of one step of each."""
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    left.plot(runs[0].losses, color="silver", linewidth=5, label="plain")
    left.plot(runs[1].losses, color="tab:purple", linewidth=1.2, label="revfx")
    left.set(title="every loss is the same, to the last bit", xlabel="step", ylabel="loss", ylim=(0, None))
    for name, memory, colour in (("plain", step.plain, "gray"), ("revfx", step.revfx, "tab:purple")):
        sizes = [nbytes / 1e6 for nbytes in memory.live]
        times = [i / (len(sizes) - 1) for i in range(len(sizes))]
        right.fill_between(times, sizes, color=colour, alpha=0.25)
        right.plot(times, sizes, color=colour, linewidth=1.2, label=f"{name}: at most {mb(memory.peak)}")
    highest = 1.3 * step.plain.peak / 1e6  # the legend takes the rest
    right.set(title="memory over one step", xlabel="from its first allocation to its last", ylabel="MB", xticks=[])
    right.set(ylim=(0, highest), xlim=(0, 1))
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)


def main() -> None:
    """Train the models, print their losses, memory and time, and draw them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--short", action="store_true", help="three epochs of a narrower net")
    parser.add_argument("--epochs", type=int, help="default: 8")
    parser.add_argument("--to", type=Path, default=Path("revnet_digits.png"), help="the picture (default: %(default)s)")
    args = parser.parse_args()
    epochs = args.epochs or (3 if args.short else 8)
    width, couplings = (16, 4) if args.short else (24, 6)
    torch.set_num_threads(1)  # so that times and losses can be repeated

    x, y, x_test, y_test = digits()
    torch.manual_seed(0)
    model = RevNet(width, couplings)
    weights = sum(p.numel() for p in model.parameters())
    print(f"{len(x)} digits to train, {len(x_test)} to test; {weights} weights")
    measured = compare(model, lambda m: F.cross_entropy(m(x[:BATCH]), y[:BATCH]))
    print_comparison(measured)
    deeper = RevNet(width, 2 * couplings)
    deep = compare(deeper, lambda m: F.cross_entropy(m(x[:BATCH]), y[:BATCH]), repeats=1)
    print(f"twice as deep: peak {mb(deep.plain.peak)} plain, {mb(deep.revfx.peak)} with revfx")

    per_epoch = len(x) // BATCH
    runs = make_runs(width, couplings, epochs * per_epoch)
    plain, converted = runs
    print("\nepoch   loss plain   loss revfx   test plain   test revfx")
    order = torch.Generator().manual_seed(0)
    right: list[float] = []
    with tqdm(total=epochs * per_epoch, disable=None, leave=False) as bar:
        for epoch in range(epochs):
            for b in torch.randperm(len(x), generator=order)[: per_epoch * BATCH].view(-1, BATCH):
                for run in runs:
                    run.step(x[b], y[b])
                bar.update()
            loss = [sum(run.losses[-per_epoch:]) / per_epoch for run in runs]
            right = [run.accuracy(x_test, y_test) for run in runs]
            row = "".join(f"{v:13.6f}" for v in loss) + " " + "".join(f"{v:13.2%}" for v in right)
            bar.write(f"{epoch + 1:5}{row}")

    same = sum(a == b for a, b in zip(plain.losses, converted.losses, strict=True))
    print(f"\n{same} of {len(plain.losses)} losses are the same to the last bit")
    print(f"training took {plain.seconds:.1f} s plain, {converted.seconds:.1f} s with revfx")

    require(measured.difference == 0, "the gradients are plain autograd's, bit for bit")
    require(same == len(plain.losses), "every loss is plain's")
    ends = zip(plain.model.state_dict().values(), converted.model.state_dict().values(), strict=True)
    require(all(torch.equal(a, b) for a, b in ends), "weights and buffers end as plain's")
    growth = (deep.revfx.peak - measured.revfx.peak) / (deep.plain.peak - measured.plain.peak)
    require(growth < 0.1, "the peak memory grows with depth by codes alone")
    require(measured.saving > 2, "the peak memory is less than half of plain's")
    wanted = 0.9 if args.short else 0.97
    require(min(right) >= wanted, f"both models name {wanted:.0%} of the test digits rightly")
    draw(runs, measured, args.to)
    print(f"wrote {args.to}")


if __name__ == "__main__":
    main()
