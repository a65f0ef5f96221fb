"""Trains plain and converted side by side, and prints whether they are the same.

`python tests/support/measure_lossless.py`: 24-layer language models of 64 dimensions, with dropout, on text that ships
with Python, by 300 AdamW steps, in float32 and with bf16 autocast. Printed are how many losses are equal to the last
bit, whether all weights are in the end, and the bytes of codes per element of a coded value.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import revfx


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
    regions = [r for p in models[1].revfx.plans for r in p.regions.values()]
    values = [(r.program.values[v], r) for r in regions for v in r.codecs]
    elements = sum(torch.Size(v.shape).numel() for v, _ in values)
    coded = sum(r.coded for r in regions)
    print(
        f"{equal} of {steps} losses equal, weights {'equal' if weights else 'NOT equal'}; last loss {last:.4f};"
        f" {coded / max(elements, 1):.3f} bytes an element of {len(values)} values, {coded} in all"
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


if __name__ == "__main__":
    language()
