"""Trains plain and converted side by side, and prints whether they are the same.

`python tests/support/measure_lossless.py`: 24-layer language models of 64 dimensions, with dropout, on text that ships
with Python, by 300 AdamW steps, in float32 and with bf16 autocast. Printed are how many losses are equal to the last
bit, whether all weights and buffers are in the end, the units that matched, and the bytes of codes. Before them the
same of a few steps of what is hard to compute back; `... hard` stops there.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import revfx
from revfx.converted import conversion_of


LAYERS, D, LENGTH, BATCH, STEPS = 24, 64, 64, 4, 300


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(D), nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).view(n, t, 3, 4, D // 4).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return F.dropout(self.out(y.transpose(1, 2).reshape(n, t, D)), 0.1, self.training)


def feed() -> nn.Module:
    return nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D), nn.Dropout(0.1))


class Both(nn.Module):
    """A pre-norm block without its residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.feed = Attention(), feed()

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention(x)
        return y + self.feed(x + y)


class Language(nn.Module):
    """An embedding, a way through the layers, and a head."""

    def __init__(self, way: str, vocabulary: int, h: float = 0.25) -> None:
        super().__init__()
        self.way, self.h = way, h
        self.embedding, self.position = nn.Embedding(vocabulary, D), nn.Parameter(torch.randn(LENGTH, D) * 0.02)
        pairs = way in ("RevNet", "Hamiltonian")
        self.f = nn.ModuleList(Attention() if pairs else Both() for _ in range(LAYERS))
        self.g = nn.ModuleList(feed() for _ in range(LAYERS if pairs else 0))
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position
        prev, cur, h = x, x, self.h
        if self.way in ("RevNet", "Hamiltonian"):
            h = 1.0 if self.way == "RevNet" else h
            for f, g in zip(self.f, self.g, strict=True):
                prev = prev + h * f(cur)
                cur = cur + h * g(prev)
        elif self.way == "leapfrog":
            for f in self.f:
                prev, cur = cur, 2 * cur - prev + h * h * f(cur)
        else:
            a = float(self.way.rpartition(" ")[2])
            for f in self.f:
                prev, cur = cur, a * prev + (1 - a) * cur + 2 * h * f(cur)
        return self.head(self.norm(cur + prev))


def text() -> tuple[Tensor, int]:
    """Python's own manual as numbers, and how many different ones."""
    letters = "".join(topics[k] for k in sorted(topics))
    known = {c: i for i, c in enumerate(sorted(set(letters)))}
    return torch.tensor([known[c] for c in letters]), len(known)


def side_by_side(
    make: Callable[[], nn.Module], batch: Callable[[], Any], loss: Callable[..., Tensor], steps: int, autocast: bool
) -> None:
    """Print how far training by two copies agrees."""
    torch.manual_seed(0)
    plain = make()
    models: list[Any] = [plain, revfx.convert(copy.deepcopy(plain))]
    optimizers = [torch.optim.AdamW(m.parameters(), 1e-3) for m in models]
    equal, last = 0, 0.0
    for step in range(steps):
        given, losses = batch(), list[Tensor]()
        for model, optimizer in zip(models, optimizers, strict=True):
            torch.manual_seed(step + 1)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                value = loss(model, given)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            losses.append(value.detach())
        equal += torch.equal(*losses)
        last = losses[0].item()
    pairs = zip(*(m.state_dict().values() for m in models), strict=True)
    weights = all(torch.equal(a, b) for a, b in pairs)
    planned = conversion_of(models[1]).planned
    assert planned is not None
    kinds = [*planned.kinds.values()]
    freed = sum(region.freed_bytes for kind in kinds for region in kind.found.regions)
    print(
        f"{equal} of {steps} losses equal, weights {'equal' if weights else 'NOT equal'}; last loss {last:.4f};"
        f" {sum(k.matched for k in kinds)} of {sum(k.units for k in kinds)} units matched;"
        f" codes of {planned.coded_bytes:,} bytes, for {freed:,} bytes that are freed"
    )


def language() -> None:
    """Train the six models in both precisions."""
    tokens, vocabulary = text()

    def batch() -> Tensor:
        at = torch.randint(len(tokens) - LENGTH - 1, (BATCH,))
        return torch.stack([tokens[i : i + LENGTH + 1] for i in at.tolist()])

    def loss(model: nn.Module, given: Tensor) -> Tensor:
        return F.cross_entropy(model(given[:, :-1]).flatten(0, 1).float(), given[:, 1:].flatten())

    for way in ("midpoint 1", "midpoint .95", "midpoint .5", "leapfrog", "Hamiltonian", "RevNet"):
        for autocast in (False, True):
            print(f"{way}, {'bf16 autocast' if autocast else 'float32'}: ", end="", flush=True)
            side_by_side(lambda way=way: Language(way, vocabulary), batch, loss, STEPS, autocast)


class Hard(nn.Module):
    """What is hard to compute back, on streams of `d` features; `way` says which."""

    def __init__(self, way: str, layers: int, d: int, f: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.way, self.layers = way, layers
        self.f = nn.ModuleList(f(d) for _ in range(1 if way == "leapfrog" else layers))
        self.mask = nn.Buffer(torch.where(torch.arange(d) % 3 == 0, -1e9, 0.0))

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        if self.way == "momentum":
            for f in self.f:
                b = 0.9 * b + 0.1 * f(a)
                a = a + b
        elif self.way == "leapfrog":
            for _ in range(self.layers):
                a, b = b, 2 * b - a + 1e-4 * self.f[0](b)
        elif self.way == "affine":
            for f in self.f:
                t, s = f(b).chunk(2, 1)
                a, b = b, a * s.tanh().exp() + t
        elif self.way == "underflow":
            for f in self.f:
                a, b = b, a * torch.exp(-60 * f(b).abs()) + b
        elif self.way == "mask":
            for f in self.f:
                a, b = b, a + f(b) + self.mask
        elif self.way == "whole numbers":
            for f in self.f:
                a, b = b, a + f(F.dropout(b, 0.5, self.training)).round()
        else:
            for f in self.f:
                a, b = b, a + f(b)
        return torch.cat([a, b], 1).clamp(-100, 100)


def hard() -> None:
    """Train what is hard to compute back."""
    rows = torch.Generator().manual_seed(0)
    images = torch.rand(4, 8, 16, 16, generator=rows)
    images[images < 0.5] = 0

    def numbers(d: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(256, 2 * d, generator=rows, dtype=dtype)

    def mlp(out: int = 1) -> Callable[[int], nn.Module]:
        return lambda d: nn.Sequential(nn.Linear(d, 2 * d), nn.Tanh(), nn.Linear(2 * d, out * d))

    def image(channels: int) -> nn.Module:
        return nn.Sequential(nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels))

    cases: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], int]] = {
        "momentum .9, 400 layers": (lambda: Hard("momentum", 400, 32, mlp()), lambda: numbers(32), 5),
        "leapfrog, 10,000 steps, float64": (
            lambda: Hard("leapfrog", 10_000, 8, mlp()).double(), lambda: numbers(8, torch.float64), 1,
        ),
        "affine, 24 couplings": (lambda: Hard("affine", 24, 16, mlp(2)), lambda: numbers(16), 20),
        "exp(s) that underflows": (lambda: Hard("underflow", 24, 16, mlp()), lambda: numbers(16), 20),
        "masks of -1e9 on a stream": (lambda: Hard("mask", 16, 16, mlp()), lambda: numbers(16), 20),
        "exact zeros into relu": (lambda: Hard("zeros", 16, 4, image), lambda: images, 20),
        "dropout over whole numbers": (
            lambda: Hard("whole numbers", 16, 16, mlp()), lambda: numbers(16).mul(4).round(), 20,
        ),
    }  # fmt: skip
    for name, (make, batch, steps) in cases.items():
        print(f"{name}: ", end="", flush=True)
        side_by_side(make, batch, lambda model, x: model(x).square().mean(), steps, autocast=False)


if __name__ == "__main__":
    hard()
    if "hard" not in sys.argv[1:]:
        language()
