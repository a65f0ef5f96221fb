"""Memory and time of a GPT by its depth: plain, checkpoints, the least budget, and the same model in a reversible form.

The reversible form has two streams: `x1 = x1 + attention(x2)`, `x2 = x2 + mlp(x1)`. It is another model with as many
weights, so its time is compared with its own plain step.

    python examples/depth.py                    # four minutes
    python examples/depth.py --layers 8,24
    python examples/depth.py --short            # ten seconds
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable

import torch
from _report import mb, require
from fit_gpt import CHARACTERS, Gpt, peak
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from tqdm import tqdm

import revfx


Step = Callable[[Tensor], Tensor]


class ReversibleGpt(Gpt):
    """The same GPT with two streams, in plain PyTorch."""

    def forward(self, text: Tensor) -> Tensor:
        """The mean cross-entropy of the next characters; text: (B, T + 1)."""
        x1 = x2 = self.token(text[:, :-1]) + self.position.weight
        for block in self.blocks:
            x1 = x1 + block.attend(x2)
            x2 = x2 + block.mlp(block.norms[1](x1))
        return self.loss(x1 + x2, text)


def at_two_levels(model: Gpt, text: Tensor) -> Tensor:
    """The loss with checkpoints of about the square root of the depth blocks, and of each block within them."""

    def run(block: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: checkpoint(block, x, use_reentrant=False)

    x = model.token(text[:, :-1]) + model.position.weight
    segments = round(math.sqrt(len(model.blocks)))
    return model.loss(checkpoint_sequential([run(b) for b in model.blocks], segments, x, use_reentrant=False), text)


def least_budget(model: Gpt, text: Tensor) -> nn.Module:
    """The model, converted with the smallest budget that is feasible."""
    try:
        revfx.convert(model, memory=1)(text).backward()
    except revfx.BudgetError as error:
        return revfx.convert(model, memory=error.least)
    raise SystemExit("FAILED: a budget of one byte is refused")


def seconds(step: Step, text: Tensor, rounds: int) -> float:
    """The median time of a step."""
    found: list[float] = []
    for _ in range(rounds):
        start = time.perf_counter()
        step(text).backward()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def main() -> None:
    """Print a table of memory and time, by depth and by way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layers", help="default: 8,24,48,96")
    parser.add_argument("--short", action="store_true", help="4 layers")
    args = parser.parse_args()
    torch.set_num_threads(1)  # so that times can be repeated
    d, context, batch, rounds = (32, 32, 2, 2) if args.short else (128, 128, 4, 5)
    depths = [int(n) for n in (args.layers or ("4" if args.short else "8,24,48,96")).split(",")]
    text = torch.randint(CHARACTERS, (batch, context + 1))
    print(f"{'layers':>6}  {'':34}{'peak':>12}{'of plain':>10}{'time of plain':>16}")
    for depth in tqdm(depths, disable=None, leave=False):
        torch.manual_seed(0)
        plain, other = Gpt(depth, d, context), ReversibleGpt(depth, d, context)
        checkpointed = Gpt(depth, d, context)
        checkpointed.checkpoints = True
        ways: list[tuple[str, Step, Step]] = [
            ("plain", plain, plain),
            ("a checkpoint for each block", checkpointed, plain),
            ("checkpoints at two levels", lambda text, model=plain: at_two_levels(model, text), plain),
            ("convert, the least budget", least_budget(plain, text), plain),
            ("reversible, plain", other, other),
            ("reversible, convert", revfx.convert(other), other),
        ]
        peaks: dict[str, int] = {}
        for name, step, base in ways:
            peaks[name] = peak(step, text)
            slower = seconds(step, text, rounds) / seconds(base, text, rounds)
            share = peaks[name] / peaks["plain"]
            tqdm.write(f"{depth:6}  {name:34}{mb(peaks[name]):>12}{share:>10.3f}{slower:>16.2f}")
        require(peaks["convert, the least budget"] < peaks["plain"] / 2, "the least budget is below half of plain's")


if __name__ == "__main__":
    main()
