"""The largest batch of a small GPT in a given memory: plainly, with checkpoints, and with a budget.

The memory is for what one training step allocates. Each way trains its largest batch for some steps, and the table
shows tokens per second; the last row is the budget with the batch of the checkpoints. At the largest batch of the plain
model all three ways give the same loss, to the last bit.

    python examples/fit_gpt.py                      # two minutes, 64 MiB
    python examples/fit_gpt.py --mib 256 --layers 12
    python examples/fit_gpt.py --short              # half a minute
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Mapping

import torch
from _report import mb, require
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import revfx
from revfx.testing import measure_memory


CHARACTERS = 96


class Block(nn.Module):
    """A block of GPT-2: causal attention and a position-wise part, each after a layer norm; x: (B, T, d)."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(d), nn.LayerNorm(d)])
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))

    def attend(self, x: Tensor) -> Tensor:
        """The result of attention, (B, T, d)."""
        b, t, d = x.shape
        q, k, v = self.qkv(self.norms[0](x)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(b, t, d))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, d)."""
        x = x + self.attend(x)
        return x + self.mlp(self.norms[1](x))


class Gpt(nn.Module):
    """A small GPT with its loss; if `checkpoints` is set, each block is a checkpoint of torch."""

    def __init__(self, layers: int, d: int, context: int) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(CHARACTERS, d), nn.Embedding(context, d)
        self.blocks = nn.ModuleList(Block(d, 4) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, CHARACTERS)
        self.checkpoints = False

    def forward(self, text: Tensor) -> Tensor:
        """The mean cross-entropy of the next characters; text: (B, T + 1)."""
        x = self.token(text[:, :-1]) + self.position.weight
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpoints else block(x)
        return self.loss(x, text)

    def loss(self, x: Tensor, text: Tensor) -> Tensor:
        """The mean cross-entropy of the characters that follow, after the last block."""
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), text[:, 1:].flatten())


def largest(fits: Callable[[int], bool], part: int) -> int:
    """The largest batch that fits, to this part of it; 0 if none does."""
    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // part):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def peak(model: Callable[[Tensor], Tensor], text: Tensor) -> int:
    """The bytes that one training step takes."""
    return measure_memory(lambda: model(text)).peak


def tokens_per_second(model: nn.Module, text: Tensor, steps: int) -> float:
    """The tokens that a training sees in a second, without the first two steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    start = 0.0
    for step in range(steps + 2):
        if step == 2:
            start = time.perf_counter()
        optimizer.zero_grad()
        model(text).backward()
        optimizer.step()
    return steps * (text.numel() - len(text)) / (time.perf_counter() - start)


def row(name: str, model: nn.Module, text: Tensor, short: bool) -> str:
    """A row of the table: the batch, the peak of a step and the speed of a training."""
    taken, speed = peak(model, text), tokens_per_second(copy.deepcopy(model), text, 2 if short else 5)
    return f"{name:34}{len(text):>14}{mb(taken):>12}{speed:>20,.0f}"


def main() -> None:
    """Find and train the largest batch of each way, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--mib", type=int, help="memory of a step in MiB; default: 64")
    parser.add_argument("--layers", type=int, help="default: 6")
    parser.add_argument("--short", action="store_true", help="a smaller model in 16 MiB")
    args = parser.parse_args()
    torch.set_num_threads(1)  # so that times and losses can be repeated
    torch.manual_seed(0)
    d, context = (64, 64) if args.short else (128, 128)
    memory = (args.mib or (16 if args.short else 64)) * 2**20
    plain = Gpt(args.layers or (4 if args.short else 6), d, context)
    checkpointed = copy.deepcopy(plain)
    checkpointed.checkpoints = True

    def text_of(batch: int) -> Tensor:
        return torch.randint(CHARACTERS, (batch, context + 1), generator=torch.Generator().manual_seed(batch))

    ways: Mapping[str, Callable[[], nn.Module]] = {
        "plain": lambda: plain,
        "a checkpoint for each block": lambda: checkpointed,
        f'convert(model, memory="{memory >> 20}MiB")': lambda: revfx.convert(plain, memory=memory),
    }
    progress = tqdm(total=len(ways), disable=None, leave=False)
    print(f"{'':34}{'largest batch':>14}{'peak':>12}{'tokens per second':>20}")
    batches: dict[str, int] = {}
    for name, make in ways.items():
        progress.set_description(name)

        def fits(batch: int, name: str = name, make: Callable[[], nn.Module] = make) -> bool:
            model, text = make(), text_of(batch)
            if "convert" not in name:
                return measure_memory(lambda: model(text), warm_up=False).peak <= memory
            try:
                model(text).backward()  # the plan is made at its end
            except revfx.BudgetError:
                return False
            return True

        batches[name] = largest(fits, part=4 if args.short else 8)
        require(batches[name] > 0, f"a batch of 1 fits in {mb(memory)}")
        tqdm.write(row(name, make(), text_of(batches[name]), args.short))
        progress.update()
    progress.close()
    _, (checkpoints, _), (budget, within) = ways.items()
    print(row(budget, within(), text_of(batches[checkpoints]), args.short))

    text = text_of(batches["plain"])
    losses: set[float] = set()
    for make in ways.values():
        model = make()
        for _ in range(2):  # the second step follows the plan
            loss = model(text)
            loss.backward()
        losses.add(loss.item())
    require(len(losses) == 1, "the losses of the three ways are equal")
    print(f"at a batch of {len(text)} all three have the same loss, to the last bit: {losses.pop():.6f}")
    plainly, _, budgeted = batches.values()
    require(budgeted > plainly, "a larger batch fits with a budget")


if __name__ == "__main__":
    main()
