"""Two flows learn handwritten digits forwards, and draw some by the inverse that revfx infers.

A flow maps images x to noise z and is trained on `log p(x) = log N(z) + log |dz/dx|`; sampling needs x of z. Neither
RealNVP nor Glow below has a line of code for that: `revfx.inverse(flow, x)` finds it in the recorded forward, as
`revfx.convert(flow)` finds what it need not keep. Dinh et al., "Density estimation using Real NVP",
https://arxiv.org/abs/1605.08803; Kingma and Dhariwal, "Glow", https://arxiv.org/abs/1807.03039. The data are the 1,797
digits of scikit-learn, 8 x 8 pixels in 17 levels, with noise of one level added.

    python examples/flow_samples.py            # two minutes; writes flow_samples.png
    python examples/flow_samples.py --short    # ten seconds
"""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path

import torch
from _report import compare, print_comparison, require
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import revfx


os.environ.setdefault("MPLBACKEND", "agg")
SIDE, LEVELS = 8, 17
PIXELS = SIDE**2


class RealNVP(nn.Module):
    """Affine couplings of 64 pixels, with a fixed permutation before each."""

    orders: Tensor

    def __init__(self, couplings: int, hidden: int) -> None:
        super().__init__()
        self.nets = nn.ModuleList(mlp(PIXELS // 2, hidden, PIXELS) for _ in range(couplings))
        self.register_buffer("orders", torch.stack([torch.randperm(PIXELS) for _ in range(couplings)]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Noise (B, 64) for images (B, 64), and the log-determinant (B,)."""
        log_det = x.new_zeros(len(x))
        for net, order in zip(self.nets, self.orders, strict=True):
            x1, x2 = x[:, order].chunk(2, dim=-1)
            s, t = net(x1).chunk(2, dim=-1)
            s = torch.tanh(s)
            x = torch.cat([x1, x2 * torch.exp(s) + t], dim=-1)
            log_det = log_det + s.sum(dim=-1)
        return x, log_det


class Step(nn.Module):
    """Activation normalisation, which the first batch sets, a 1x1 convolution, and an affine coupling of channels."""

    ready: Tensor

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.scale, self.shift = (nn.Parameter(torch.zeros(1, channels, 1, 1)) for _ in range(2))
        self.register_buffer("ready", torch.tensor(False))
        self.mix = nn.Parameter(torch.linalg.qr(torch.randn(channels, channels))[0])
        last = nn.Conv2d(hidden, channels, 3, padding=1)
        nn.init.zeros_(last.weight)
        self.net = nn.Sequential(
            nn.Conv2d(channels // 2, hidden, 3, padding=1), nn.SiLU(), nn.Conv2d(hidden, hidden, 1), nn.SiLU(), last
        )  # fmt: skip

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, c, h, w), and the log-determinant (B,)."""
        if not self.ready:
            self.scale.data = -x.std(dim=(0, 2, 3), keepdim=True).log()
            self.shift.data = -x.mean(dim=(0, 2, 3), keepdim=True) * self.scale.exp()
            self.ready = torch.tensor(True)
        x = x * self.scale.exp() + self.shift
        x = F.conv2d(x, self.mix[:, :, None, None])
        a, b = x.chunk(2, dim=1)
        s, t = self.net(a).chunk(2, dim=1)
        s = torch.tanh(s)
        constant = x[0, 0].numel() * (self.scale.sum() + torch.linalg.slogdet(self.mix)[1])
        return torch.cat([a, b * s.exp() + t], dim=1), s.flatten(1).sum(dim=1) + constant


class Glow(nn.Module):
    """A chain of steps on the pixels of 2 x 2 blocks as channels."""

    def __init__(self, steps: int, hidden: int) -> None:
        super().__init__()
        self.steps = nn.ModuleList(Step(4, hidden) for _ in range(steps))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Noise (B, 4, 4, 4) for images (B, 64), and the log-determinant (B,)."""
        x = F.pixel_unshuffle(x.view(-1, 1, SIDE, SIDE), 2)
        log_det = x.new_zeros(len(x))
        for step in self.steps:
            x, more = step(x)
            log_det = log_det + more
        return x, log_det


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Three layers, the last of which starts at zero."""
    last = nn.Linear(hidden, outputs)
    nn.init.zeros_(last.weight)
    return nn.Sequential(nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), last)


def log_density(flow: nn.Module, x: Tensor) -> Tensor:
    """The log-density (B,) of images, in nats."""
    z, log_det = flow(x)
    return log_det - 0.5 * (z.flatten(1).square() + math.log(2 * math.pi)).sum(dim=1)


def noisy(levels: Tensor) -> Tensor:
    """Images in -1..1 with the noise of one level, so that they have a density."""
    return (levels + torch.rand_like(levels)) / LEVELS * 2 - 1


def fit(name: str, flow: nn.Module, images: Tensor, epochs: int) -> float:
    """The bits per pixel at the end; maximises the likelihood of `images`, in batches of 200."""
    optimizer = torch.optim.AdamW(flow.parameters(), lr=2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    bits = math.inf
    for epoch in tqdm(range(1, epochs + 1), disable=None, leave=False):
        found: list[float] = []
        for batch in torch.randperm(len(images)).split(200):
            loss = -log_density(flow, noisy(images[batch])).mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(flow.parameters(), 10.0)
            optimizer.step()
            found.append(loss.item())
        schedule.step()
        bits = (sum(found) / len(found) / PIXELS + math.log(LEVELS / 2)) / math.log(2)
        if epoch % max(1, epochs // 4) == 0:
            tqdm.write(f"{name:>8}, epoch {epoch:3}: {bits:.3f} bits per pixel")
    return bits


def draw(rows: dict[str, Tensor], file: Path) -> None:
    """Write a picture with 16 images for each name."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(rows), 1, figsize=(9, 1.35 * len(rows) + 0.2), layout="constrained")
    for (name, images), axis in zip(rows.items(), axes, strict=True):
        tiles = F.pad(images[:32].view(-1, SIDE, SIDE), (1, 1, 1, 1), value=-1).view(2, 16, SIDE + 2, SIDE + 2)
        axis.imshow(torch.cat([torch.cat([*row], dim=1) for row in tiles]).clamp(-1, 1), cmap="gray_r")
        axis.set_title(name, loc="left", fontsize=9)
        axis.axis("off")
    figure.savefig(file, dpi=150)


def main() -> None:
    """Fit both converted flows, and draw samples of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--short", action="store_true", help="fewer epochs")
    parser.add_argument("--to", type=Path, default=Path("flow_samples.png"), help="the picture (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)  # so that times and losses can be repeated
    torch.manual_seed(0)
    images = torch.as_tensor(load_digits(return_X_y=True)[0]).float()
    rows = {"data": noisy(images[:32])}
    for name, flow, epochs in (("RealNVP", RealNVP(12, 256), 80), ("Glow", Glow(16, 48), 40)):
        converted = revfx.convert(flow)
        bits = fit(name, converted, images, 2 if args.short else epochs)
        x = noisy(images[:200])
        measured = compare(flow, lambda m, x=x: -log_density(m, x).mean(), repeats=3)
        print_comparison(measured)
        require(measured.difference == 0, "the gradients are plain autograd's, bit for bit")
        require(measured.saving > 4, "the peak memory is less than a quarter of plain's")
        inverse = revfx.inverse(flow, x)
        with torch.no_grad():
            z, _ = flow(x)
            error = float((inverse(z) - x).abs().max())
            rows[f"{name}, {bits:.2f} bits per pixel"] = inverse(0.8 * torch.randn_like(z[:32]))
        print(f"{name}: images come back from their noise within {error:.1e}\n")
        require(error < 1e-3, "the inverse gives the images back")
    draw(rows, args.to)
    print(f"wrote {args.to}")


if __name__ == "__main__":
    main()
