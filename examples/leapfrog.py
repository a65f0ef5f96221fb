"""Gradients through 1,000 leapfrog steps of a simulation, in the memory of one step.

A chain of 256 masses hangs together by springs of unknown stiffness. It is plucked at 16 places, its motion
is observed after 1,000 steps, and the stiffness along the chain is found by gradient descent through the
whole simulation: what geophysicists call full-waveform inversion, here in one dimension. Plain autograd keeps
something of every step. The leapfrog scheme can be run backwards, and `revfx.convert` finds that out by
itself.

    python examples/leapfrog.py            # a minute
    python examples/leapfrog.py --short    # ten seconds
"""

from __future__ import annotations

import argparse
import time

import torch
from _report import Comparison, compare, mb, ms, require
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import revfx


MASSES = 256
SHAPES = 16


class Springs(nn.Module):
    """Force on each mass of a chain with fixed ends: f_i = k_i+1 (q_i+1 - q_i) - k_i (q_i - q_i-1)."""

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        """Forces (B, n) of displacements (B, n) and stiffnesses (n + 1,)."""
        pull = k * F.pad(q, (1, 1)).diff(dim=-1)
        return pull.diff(dim=-1)


class Chain(nn.Module):
    """The motion of the chain, as a function of its stiffness at `knots` points (linear in between)."""

    m: Tensor

    def __init__(self, steps: int, knots: int = 16, h: float = 0.3) -> None:
        super().__init__()
        self.steps, self.h = steps, h
        self.log_stiffness = nn.Parameter(torch.zeros(knots))
        self.force = Springs()
        self.register_buffer("m", torch.linspace(0.8, 1.2, MASSES))

    def stiffness(self) -> Tensor:
        """(n + 1,)."""
        return F.interpolate(self.log_stiffness.exp()[None, None], MASSES + 1, mode="linear", align_corners=True)[0, 0]

    def forward(self, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        """Displacements and momenta (B, n) after all steps."""
        h, k = self.h, self.stiffness()
        p = p + 0.5 * h * self.force(q, k)
        for _ in range(self.steps):
            q = q + h * p / self.m
            p = p + h * self.force(q, k)
        p = p - 0.5 * h * self.force(q, k)
        return q, p


def plucks(count: int = SHAPES) -> tuple[Tensor, Tensor]:
    """Displacements and momenta at the start: a hump at another place each, at rest."""
    at = torch.arange(MASSES) / MASSES
    centre = torch.linspace(0.1, 0.9, count)[:, None]
    q = torch.exp(-(((at - centre) / 0.06) ** 2))
    return q, torch.zeros_like(q)


def measure(steps: int) -> Comparison:
    """Memory, time and gradients of one step of gradient descent."""
    chain = Chain(steps)
    q, p = plucks()
    return compare(chain, lambda m: sum((t.square().mean() for t in m(q, p)), torch.zeros(())))


def fit(steps: int, gradients: int) -> tuple[float, float, float, float]:
    """First and last loss, and the error (relative) of the stiffness before and after, by L-BFGS."""
    truth = Chain(steps)
    with torch.no_grad():
        truth.log_stiffness.add_(0.2 * torch.sin(torch.linspace(0.0, 7.0, len(truth.log_stiffness))))
        seen = truth(*plucks())
        hidden = truth.stiffness()
    model = Chain(steps)
    simulate = revfx.convert(model)  # the same parameters
    optimizer = torch.optim.LBFGS(
        model.parameters(),
        max_iter=gradients,
        max_eval=gradients,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )
    losses: list[float] = []
    errors: list[float] = []

    def evaluate() -> Tensor:
        optimizer.zero_grad()
        got = simulate(*plucks())
        loss = sum((F.mse_loss(g, s) / s.square().mean() for g, s in zip(got, seen, strict=True)), torch.zeros(()))
        loss.backward()
        losses.append(loss.item())
        errors.append(((model.stiffness().detach() - hidden).norm() / hidden.norm()).item())
        bar.update()
        if len(losses) % 5 == 1:
            bar.write(f"{len(losses):10}{losses[-1]:12.1e}{errors[-1]:20.1e}")
        return loss

    with tqdm(total=gradients, disable=None, leave=False) as bar:
        optimizer.step(evaluate)
    if len(losses) % 5 != 1:
        print(f"{len(losses):10}{losses[-1]:12.1e}{errors[-1]:20.1e}")
    return losses[0], losses[-1], errors[0], errors[-1]


def main() -> None:
    """Measure the simulation, then fit it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--short", action="store_true", help="at most 300 steps of the simulation")
    args = parser.parse_args()
    torch.set_num_threads(1)  # so that times can be repeated
    torch.set_default_dtype(torch.float64)
    longest, gradients = (300, 16) if args.short else (1000, 40)

    titles = ("peak plain", "peak revfx", "time plain", "time revfx", "first call", "gradient off by")
    print(f"{'steps':>6}" + "".join(f"{t:>13}" for t in titles[:-1]) + f"{titles[-1]:>18}")
    found: list[Comparison] = []
    for steps in (longest // 4, longest // 2, longest):
        c = measure(steps)
        cells = (mb(c.plain.peak), mb(c.revfx.peak), ms(c.plain_time), ms(c.revfx_time))
        row = "".join(f"{cell:>13}" for cell in cells)
        print(f"{steps:6}{row}{c.first_call:11.2f} s{c.difference:18.1e}")
        found.append(c)

    print(f"\n{'gradients':>10}{'misfit':>12}{'stiffness off by':>20}")
    start = time.perf_counter()
    first, last, before, after = fit(longest, gradients)
    print(f"took {time.perf_counter() - start:.1f} s with revfx")

    require(max(c.difference for c in found) == 0, "the gradients are plain autograd's, bit for bit")
    growth = [getattr(found[-1], way).peak - getattr(found[0], way).peak for way in ("revfx", "plain")]
    require(growth[0] < 0.15 * growth[1], "the peak memory grows with the steps by codes alone")
    require(last < 0.01 * first and after < 0.1 * before, "the stiffness is found")


if __name__ == "__main__":
    main()
