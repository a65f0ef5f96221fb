"""A character-level language model: a reversible transformer with dropout, fed with Python's own manual.

Each layer is `x1 = x1 + attention(x2)`, `x2 = x2 + mlp(x1)`, as in the Reformer (Kitaev et al.,
https://arxiv.org/abs/2001.04451), in plain PyTorch. The text is what `help()` shows: the language reference
in `pydoc_data.topics`, and the Zen of Python. The backward pass evaluates every layer again, and draws the
same dropout masks as the forward did: the gradients equal plain autograd's, and the random number generator
is left in the same state.

    python examples/rev_transformer.py            # a minute and a half
    python examples/rev_transformer.py --short    # ten seconds
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import io
import math
import re
import time
from collections.abc import Callable

import torch
from _report import compare, print_comparison, require
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import revfx


class Attention(nn.Module):
    """Causal self-attention after a layer norm; x: (B, T, d)."""

    def __init__(self, d: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.p = heads, dropout
        self.norm = nn.LayerNorm(d)
        self.qkv = nn.Linear(d, 3 * d, bias=False)
        self.out = nn.Linear(d, d)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, d)."""
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.dropout(self.out(y.transpose(1, 2).reshape(b, t, d)))


class Mlp(nn.Sequential):
    """The position-wise part, after a layer norm."""

    def __init__(self, d: int, dropout: float) -> None:
        super().__init__(nn.LayerNorm(d), nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d), nn.Dropout(dropout))


class Layer(nn.Module):
    """`y1 = x1 + attention(x2)`, `y2 = x2 + mlp(y1)`; both streams: (B, T, d)."""

    def __init__(self, d: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(d, heads, dropout), Mlp(d, dropout)

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        """Both streams after the layer."""
        y1 = x1 + self.attention(x2)
        y2 = x2 + self.mlp(y1)
        return y1, y2


class Transformer(nn.Module):
    """The logits of the next character at every position."""

    def __init__(self, characters: int, context: int, d: int = 64, layers: int = 8, dropout: float = 0.05) -> None:
        super().__init__()
        self.context = context
        self.token = nn.Embedding(characters, d)
        self.position = nn.Embedding(context, d)
        self.layers = nn.ModuleList(Layer(d, 4, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, characters)

    def forward(self, text: Tensor) -> Tensor:
        """Logits (B, T, characters) of character numbers (B, T)."""
        x = self.token(text) + self.position.weight[: text.shape[1]]
        x1, x2 = x, x
        for layer in self.layers:
            x1, x2 = layer(x1, x2)
        return self.head(self.norm(x1 + x2))


def corpus() -> str:
    """The language reference that comes with Python, and the Zen of Python."""
    from pydoc_data.topics import topics

    with contextlib.redirect_stdout(io.StringIO()):
        import this
    text = "\n\n".join([codecs.decode(this.s, "rot13"), *topics.values()])
    text = "".join(c for c in text if c == "\n" or " " <= c <= "~")
    return re.sub(" +", " ", text)


@torch.no_grad()
def continued(model: Transformer, characters: str, start: str, length: int) -> str:
    """`start`, continued by `length` characters drawn from the model."""
    model.eval()
    text = torch.tensor([[characters.index(c) for c in start]])
    for _ in range(length):
        logits = model(text[:, -model.context :])[0, -1]
        text = torch.cat([text, torch.multinomial(F.softmax(logits / 0.7, dim=-1), 1)[None]], dim=1)
    model.train()
    return "".join(characters[i] for i in text[0].tolist())


Draw = Callable[[torch.Generator], tuple[Tensor, Tensor]]


def batches_of(data: Tensor, context: int, batch: int) -> Draw:
    """What draws (B, T) characters and those that follow each of them."""

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        start = torch.randint(len(data) - context - 1, (batch, 1), generator=generator)
        at = start + torch.arange(context + 1)
        return data[at[:, :-1]], data[at[:, 1:]]

    return draw


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The cross-entropy, in nats per character."""
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


class Run:
    """A model with its optimiser, and what it has cost so far."""

    def __init__(self, model: nn.Module, steps: int) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=8e-3, weight_decay=0.01)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 8e-3, total_steps=steps)
        self.bits: list[float] = []
        self.seconds = 0.0

    def step(self, x: Tensor, y: Tensor) -> None:
        """Take one step of gradient descent."""
        start = time.perf_counter()
        loss = loss_of(self.model, x, y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.bits.append(loss.item() / math.log(2))
        self.seconds += time.perf_counter() - start


def train(plain: Run, converted: Run, draw: Draw, steps: int) -> None:
    """Train all models on the same batches and dropout masks."""
    generator = torch.Generator().manual_seed(1)
    every = max(1, steps // 8)
    print(f"\n{'step':>6}{'bits per character plain':>28}{'revfx':>12}")
    for step in tqdm(range(1, steps + 1), disable=None, leave=False):
        x, y = draw(generator)
        for run in (plain, converted):
            torch.manual_seed(step)
            run.step(x, y)
        if step % every == 0 or step == 1:
            last = [run.bits[-every:] for run in (plain, converted)]
            tqdm.write("{:6}{:28.6f}{:12.6f}".format(step, *(sum(b) / len(b) for b in last)))
    apart = [abs(a - b) for a, b in zip(plain.bits, converted.bits, strict=True)]
    print(f"steps differ by at most {max(apart[:10]):.1e} in the first 10, {max(apart):.1e} in all {steps}")
    print(f"training took {plain.seconds:.1f} s plain, {converted.seconds:.1f} s with revfx")


def main() -> None:
    """Train a plain model and a converted one, and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--short", action="store_true", help="40 steps of a smaller model")
    parser.add_argument("--steps", type=int, help="default: 600")
    args = parser.parse_args()
    torch.set_num_threads(1)  # so that times and losses can be repeated
    steps = args.steps or (40 if args.short else 600)
    context, d, layers = (32, 32, 6) if args.short else (64, 64, 8)

    text = corpus()
    characters = "".join(sorted(set(text)))
    print(f"{len(text)} characters, {len(characters)} different ones")
    draw = batches_of(torch.tensor([characters.index(c) for c in text]), context, batch=8)
    models: list[Transformer] = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(Transformer(len(characters), context, d, layers))

    x, y = draw(torch.Generator().manual_seed(0))
    measured = compare(models[0], lambda m: loss_of(m, x, y))
    print_comparison(measured)
    same = "as" if measured.same_rng else "NOT as"
    print(f"random number generator after the step: {same} plain autograd leaves it")

    plain, converted = Run(models[0], steps), Run(revfx.convert(models[1]), steps)
    train(plain, converted, draw, steps)
    torch.manual_seed(0)
    print(f"\n{continued(models[1], characters, 'The ', 120 if args.short else 300)}")

    require(measured.difference == 0, "the gradients are plain autograd's, bit for bit")
    require(measured.same_rng, "the random number generator is left as plain autograd leaves it")
    require(measured.saving > 2, "the peak memory is less than half of plain's")
    require(converted.bits[-1] < 0.8 * converted.bits[0], "the model learns")


if __name__ == "__main__":
    main()
