"""RealNVP, a normalising flow of affine couplings, fitted to real measurements; memory flat in depth.

The flow maps data x to noise z by couplings `y = x * exp(s) + t` and gives the exact log-density of every
sample. It is plain PyTorch; `revfx.convert` finds the inverse `x = (y - t) / exp(s)` in the graph of the
forward pass. The data are the 569 samples of scikit-learn's breast-cancer set, 30 features each,
standardised; the baseline is a Gaussian fitted to the same training samples. Dinh et al., "Density estimation
using Real NVP", https://arxiv.org/abs/1605.08803.

    python examples/realnvp.py            # a minute
    python examples/realnvp.py --short    # ten seconds
"""

from __future__ import annotations

import argparse
import math
import time

import torch
from _report import compare, mb, print_comparison, require
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm

import revfx


class Coupling(nn.Module):
    """`y1 = x1`, `y2 = x2 * exp(s) + t`, (s, t) a function of x1; then the halves swap places; x: (B, d)."""

    def __init__(self, features: int, hidden: int, dropout: float) -> None:
        super().__init__()
        last = nn.Linear(hidden, features)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.net = nn.Sequential(
            nn.Linear(features // 2, hidden), nn.SiLU(), nn.Dropout(dropout),
            nn.Linear(hidden, hidden), nn.SiLU(), nn.Dropout(dropout), last,
        )  # fmt: skip

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, d), and the log-determinant (B,)."""
        x1, x2 = x.chunk(2, dim=-1)
        s, t = self.net(x1).chunk(2, dim=-1)
        s = 0.5 * torch.tanh(s)
        return torch.cat([x2 * torch.exp(s) + t, x1], dim=-1), s.sum(dim=-1)


class RealNVP(nn.Module):
    """A chain of couplings, with a fixed permutation of the features after each two."""

    order: Tensor

    def __init__(self, features: int, hidden: int = 64, couplings: int = 16, dropout: float = 0.2) -> None:
        super().__init__()
        self.couplings = nn.ModuleList(Coupling(features, hidden, dropout) for _ in range(couplings))
        self.register_buffer("order", torch.randperm(features))

    def forward(self, x: Tensor) -> Tensor:
        """The log-density (B,) of samples (B, d), in nats."""
        log_det = torch.zeros(x.shape[0])
        for i, coupling in enumerate(self.couplings):
            x, step = coupling(x)
            log_det = log_det + step
            if i % 2:
                x = x[:, self.order]
        return log_det - 0.5 * (x * x + math.log(2 * math.pi)).sum(dim=-1)


def measurements() -> tuple[Tensor, Tensor]:
    """Samples to train and a quarter held out; standardised by the mean and deviation of the former."""
    data = torch.as_tensor(load_breast_cancer(return_X_y=True)[0])
    train, test = (torch.as_tensor(p) for p in train_test_split(data.numpy(), test_size=0.25, random_state=0))
    mean, deviation = train.mean(dim=0), train.std(dim=0)
    return (train - mean) / deviation, (test - mean) / deviation


def gaussian(train: Tensor, test: Tensor) -> tuple[float, float]:
    """The mean log-likelihood of both sets under the Gaussian that fits the first best."""
    fitted = torch.distributions.MultivariateNormal(train.mean(dim=0), torch.cov(train.T))
    return fitted.log_prob(train).mean().item(), fitted.log_prob(test).mean().item()


@torch.no_grad()
def likelihoods(model: nn.Module, train: Tensor, test: Tensor) -> tuple[float, float]:
    """The mean log-likelihood of both sets under the flow."""
    model.eval()
    found = model(train).mean().item(), model(test).mean().item()
    model.train()
    return found


def fit(model: nn.Module, train: Tensor, test: Tensor, epochs: int) -> None:
    """Maximise the likelihood of `train`, in batches of 142."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    print(f"{'epoch':>8}{'train':>10}{'held out':>10}   log-likelihood in nats per sample")
    for epoch in tqdm(range(1, epochs + 1), disable=None, leave=False):
        for batch in torch.randperm(len(train)).split(142):
            loss = -model(train[batch]).mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
        schedule.step()
        if epoch % max(1, epochs // 6) == 0:
            tqdm.write("{:8}{:10.2f}{:10.2f}".format(epoch, *likelihoods(model, train, test)))


def main() -> None:
    """Fit the converted flow, compare it with a Gaussian, and measure a step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--short", action="store_true", help="fewer epochs of a flow of 8 couplings")
    parser.add_argument("--epochs", type=int, help="default: 120")
    args = parser.parse_args()
    torch.set_num_threads(1)  # so that times and losses can be repeated
    couplings = 8 if args.short else 16

    train, test = measurements()
    base = gaussian(train, test)
    train, test = train.float(), test.float()
    print(f"{len(train)} samples to train, {len(test)} held out, {train.shape[1]} features")
    torch.manual_seed(0)
    model = revfx.convert(RealNVP(train.shape[1], couplings=couplings))
    start = time.perf_counter()
    fit(model, train, test, args.epochs or (60 if args.short else 120))
    print(f"took {time.perf_counter() - start:.1f} s with revfx")
    flow = likelihoods(model, train, test)
    print("{:>8}{:10.2f}{:10.2f}".format("Gaussian", *base))
    print("{:>8}{:10.2f}{:10.2f}\n".format("flow", *flow))

    fitted = RealNVP(train.shape[1], couplings=couplings)
    fitted.load_state_dict(model.state_dict())
    measured = compare(fitted, lambda m: -m(train).mean())
    print_comparison(measured)
    deeper = compare(RealNVP(train.shape[1], couplings=2 * couplings), lambda m: -m(train).mean(), repeats=1)
    peaks = f"{mb(deeper.plain.peak)} plain, {mb(deeper.revfx.peak)} with revfx"
    print(f"with {2 * couplings} couplings: peak {peaks}")

    require(measured.difference == 0, "the gradients are plain autograd's, bit for bit")
    require(measured.saving > 4, "the peak memory is less than a quarter of plain's")
    require(deeper.revfx.peak < 1.2 * measured.revfx.peak, "the peak memory is flat in depth")
    require(flow[1] > base[1], "the flow explains the held-out samples better than a Gaussian does")


if __name__ == "__main__":
    main()
