"""FSDP2: every process holds a shard of the parameters, and no process keeps the activations.

The reversible transformer of `rev_transformer.py`, on several GPUs (nccl) or, where there are none, in several
processes on a CPU (gloo). `fully_shard` is applied to the functions of each layer, attention and MLP, and to the whole;
a layer that is sharded as one would be a closed box, into which no region can reach. The model is trained plainly and
converted from the same weights, on the same batches and dropout masks.

    torchrun --nproc-per-node 2 examples/train_fsdp.py            # a minute
    torchrun --nproc-per-node 2 examples/train_fsdp.py --short    # twenty seconds
"""

from __future__ import annotations

import argparse
import math
import os
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from _report import mb, require
from rev_transformer import Transformer, batches_of, corpus, loss_of
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import revfx
from revfx.testing import Memory, measure_memory


def place() -> torch.device:
    """The device of this process, which joins the others."""
    local = int(os.environ["LOCAL_RANK"])
    if not torch.cuda.is_available():
        dist.init_process_group("gloo")
        torch.set_num_threads(1)  # so that losses can be repeated
        return torch.device("cpu")
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    return device


def sharded(model: Any) -> nn.Module:
    """The model itself, after FSDP2 was applied to each function of its couplings, and to all that is left."""
    for layer in model.layers:
        fully_shard(layer.attention)
        fully_shard(layer.mlp)
    return fully_shard(model)


class Run:
    """A sharded model and its optimiser; `bits` are the losses of all steps so far, averaged over the processes."""

    def __init__(self, model: nn.Module) -> None:
        self.model = sharded(model)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        self.bits: list[float] = []

    def memory(self, x: Tensor, y: Tensor) -> Memory:
        """What a step takes in this process, in bytes beyond parameters and their gradients."""
        found = measure_memory(lambda: loss_of(self.model, x, y), device=x.device.type)
        self.optimizer.zero_grad()
        return found

    def step(self, x: Tensor, y: Tensor) -> None:
        """Take one step of gradient descent."""
        loss = loss_of(self.model, x, y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        mean = loss.detach() / (dist.get_world_size() * math.log(2))
        dist.all_reduce(mean)
        self.bits.append(mean.item())


def train(runs: list[Run], draw: Callable[[], tuple[Tensor, Tensor]], steps: int, say: Callable[[str], None]) -> None:
    """Train all models on the same batches and dropout masks."""
    every = max(1, steps // 6)
    say(f"\n{'step':>6}{'bits per character plain':>28}{'revfx':>12}")
    for step in range(1, steps + 1):
        x, y = draw()
        for run in runs:
            torch.manual_seed(step * dist.get_world_size() + dist.get_rank())
            run.step(x, y)
        if step % every == 0 or step == 1:
            say("{:6}{:28.6f}{:12.6f}".format(step, *(run.bits[-1] for run in runs)))


def main() -> None:
    """Train a plain model and a converted one, and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--short", action="store_true", help="24 steps of a smaller model")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", ".*returned a view tensor")  # FSDP2's, of logits that nobody writes to
    steps, context, d, layers = (24, 32, 32, 6) if args.short else (100, 64, 64, 8)
    device = place()
    say = print if dist.get_rank() == 0 else lambda text: None

    text = corpus()
    characters = "".join(sorted(set(text)))
    batches = batches_of(torch.tensor([characters.index(c) for c in text]), context, batch=8)
    generator = torch.Generator().manual_seed(dist.get_rank())

    def draw() -> tuple[Tensor, Tensor]:
        """Each process draws batches of its own."""
        x, y = batches(generator)
        return x.to(device), y.to(device)

    def model() -> nn.Module:
        torch.manual_seed(0)  # all processes make the same weights
        return Transformer(len(characters), context, d, layers).to(device)

    plain, converted = Run(model()), Run(revfx.convert(model()))
    x, y = draw()
    before, after = plain.memory(x, y), converted.memory(x, y)
    say(f"{dist.get_world_size()} processes, {dist.get_backend()}; in each of them, of a step:")
    say(f"{'':24}{'plain':>12}{'revfx':>12}")
    less = f"{before.peak / after.peak:.1f} x less"
    say(f"{'peak activation memory':24}{mb(before.peak):>12}{mb(after.peak):>12}   {less}")
    say(f"{'kept after the forward':24}{mb(before.kept):>12}{mb(after.kept):>12}")

    train([plain, converted], draw, steps, say)
    apart = [abs(a - b) for a, b in zip(plain.bits, converted.bits, strict=True)]
    say(f"losses differ by at most {max(apart[:10]):.1e} in the first 10 steps, {max(apart):.1e} in all {steps}")
    # gloo's thread needs the interpreter to let go of the last loss: a process that ends meanwhile aborts
    # (pytorch/pytorch#190489)
    time.sleep(0.1)
    dist.destroy_process_group()

    require(max(apart) == 0, "the losses are plain training's, bit for bit")
    require(before.peak > 2 * after.peak, "the peak memory is less than half of plain's")
    require(converted.bits[-1] < 0.8 * converted.bits[0], "the model learns")


if __name__ == "__main__":
    main()
