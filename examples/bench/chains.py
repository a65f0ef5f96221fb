"""The reversible models of the bench: chains of blocks in plain PyTorch, without a reversible wrapper.

Libraries of reversible layers build four of them from the modules f and g of their couplings, with the same weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Chain(nn.Module):
    """`enter`, then blocks that pass a state from one to the next, then `leave`.

    Streams lie side by side along `axis`.
    """

    stem: nn.Module

    def __init__(self, blocks: Sequence[nn.Module], axis: int = -1) -> None:
        super().__init__()
        self.blocks, self.axis = nn.ModuleList(blocks), axis

    def enter(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the first state: two streams, the halves of the stem's output."""
        return self.stem(x).chunk(2, self.axis)

    def leave(self, *state: Tensor) -> Any:
        """Return the output for the last state."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Any:
        """Return the output."""
        state = self.enter(x)
        for block in self.blocks:
            state = block(*state)
        return self.leave(*state)


class Coupling(nn.Module):
    """`a + f(b)`, `b + g(a)`, one after the other."""

    def __init__(self, f: nn.Module, g: nn.Module) -> None:
        super().__init__()
        self.f, self.g = f, g

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Return both streams after the block."""
        a = a + self.f(b)
        return a, b + self.g(a)


# --- coupling MLP
def mlp(width: int, hidden: int, out: int) -> nn.Sequential:
    """Return two linear layers with a GELU between them."""
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, out))


class CouplingMlp(Chain):
    """Additive couplings of MLPs between two linear layers; x: (B, features)."""

    def __init__(self, depth: int, features: int = 32, width: int = 64) -> None:
        super().__init__([Coupling(*(mlp(width, 4 * width, width) for _ in "fg")) for _ in range(depth)])
        self.stem, self.head = nn.Linear(features, 2 * width), nn.Linear(2 * width, features)

    def leave(self, *state: Tensor) -> Tensor:
        """Return (B, features)."""
        return self.head(torch.cat(state, -1))


# --- convolutional RevNet
def convolutions(c: int) -> nn.Sequential:
    """Return two convolutions with BatchNorm, a SiLU between them.

    With a ReLU, rounding takes single inputs across zero. This changes the gradient of a narrow layer by 1e-2 in any
    way that sums in another order, `torch.compile` too, and would hide smaller errors.
    """
    first, second = (nn.Conv2d(c, c, 3, padding=1, bias=False) for _ in range(2))
    return nn.Sequential(first, nn.BatchNorm2d(c), nn.SiLU(), second, nn.BatchNorm2d(c))


class RevNet(Chain):
    """Residual convolutions on two streams, between a stem and a linear head; x: images (B, 3, H, W)."""

    def __init__(self, depth: int, channels: int = 12, classes: int = 10) -> None:
        super().__init__([Coupling(convolutions(channels), convolutions(channels)) for _ in range(depth)], axis=1)
        self.stem, self.head = nn.Conv2d(3, 2 * channels, 3, padding=1), nn.Linear(2 * channels, classes)

    def leave(self, *state: Tensor) -> Tensor:
        """Return logits (B, classes)."""
        return self.head(torch.cat(state, 1).mean((2, 3)))


# --- reversible transformer
class Attention(nn.Module):
    """Causal self-attention after a layer norm; x: (B, T, d)."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.out, self.heads = nn.LayerNorm(d), nn.Linear(d, 3 * d), nn.Linear(d, d), heads

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, T, d)."""
        n, t, d = x.shape
        q, k, v = self.qkv(self.norm(x)).view(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(n, t, d))


class Transformer(Chain):
    """Attention on one stream and an MLP on the other, as in the Reformer; x: tokens (B, T)."""

    def __init__(self, depth: int, d: int = 64, vocabulary: int = 64, length: int = 64) -> None:
        feeds = [nn.Sequential(nn.LayerNorm(d), *mlp(d, 4 * d, d)) for _ in range(depth)]
        super().__init__([Coupling(Attention(d, 4), feed) for feed in feeds])
        self.token, self.position = nn.Embedding(vocabulary, d), nn.Embedding(length, d)
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, vocabulary)

    def enter(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return two equal streams (B, T, d)."""
        stream = self.token(x) + self.position.weight[: x.shape[1]]
        return stream, stream

    def leave(self, *state: Tensor) -> Tensor:
        """Return logits (B, T, vocabulary)."""
        a, b = state
        return self.head(self.norm(a + b))


# --- affine flow
class Affine(nn.Module):
    """`x1 * exp(tanh(s(x2))) + t(x2)`, then the same for x2 from the new x1; one network for each (s, t)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.first, self.second = mlp(width, hidden, 2 * width), mlp(width, hidden, 2 * width)
        with torch.no_grad():  # near the identity at first, as is usual for flows
            for p in (*self.first[-1].parameters(), *self.second[-1].parameters()):
                p.mul_(0.1)

    def forward(self, x1: Tensor, x2: Tensor, log_det: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return both halves, and the log-determinant (B,) so far."""
        for net in (self.first, self.second):
            s, t = net(x2).chunk(2, -1)
            s = torch.tanh(s)
            x1, x2, log_det = x2, x1 * torch.exp(s) + t, log_det + s.sum(-1)
        return x1, x2, log_det


class Flow(Chain):
    """A normalising flow of affine couplings, RealNVP with a tanh in the exponent; x: (B, 2 width)."""

    def __init__(self, depth: int, width: int = 32, hidden: int = 128) -> None:
        super().__init__([Affine(width, hidden) for _ in range(depth)])

    def enter(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return two halves (B, width) and a log-determinant (B,) of zeros."""
        x1, x2 = x.chunk(2, -1)
        return x1, x2, torch.zeros(x.shape[0], dtype=x.dtype, device=x.device)

    def leave(self, *state: Tensor) -> Tensor:
        """Return log-densities (B,) under a normal distribution of the outputs, in nats."""
        x1, x2, log_det = state
        z = torch.cat([x1, x2], -1)
        return log_det - 0.5 * (z * z + math.log(2 * math.pi)).sum(-1)


# --- leapfrog
class Kick(nn.Module):
    """The change of momenta in one step: learned forces of the lengths of both springs, times `h`."""

    def __init__(self, hidden: int, h: float) -> None:
        super().__init__()
        self.h, self.net = h, nn.Sequential(nn.Linear(2, hidden), nn.Tanh(), nn.Linear(hidden, 1))

    def forward(self, q: Tensor) -> Tensor:
        """Return (B, n), of displacements (B, n)."""
        lengths = F.pad(q, (1, 1)).diff(dim=-1)
        return self.h * self.net(torch.stack([lengths[..., :-1], lengths[..., 1:]], -1)).squeeze(-1)


class Drift(nn.Module):
    """The change of displacements in one step: `h * p`."""

    def __init__(self, h: float) -> None:
        super().__init__()
        self.h = h

    def forward(self, p: Tensor) -> Tensor:
        """Return (B, n)."""
        return self.h * p


class Springs(Chain):
    """Leapfrog steps of a chain of unit masses under one learned force; x: displacements (B, masses)."""

    def __init__(self, depth: int, masses: int = 128, hidden: int = 16, h: float = 0.1) -> None:
        kick, drift = Kick(hidden, h), Drift(h)
        super().__init__([Coupling(kick, drift) for _ in range(depth)])
        self.push = nn.Parameter(torch.randn(masses))

    def enter(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return momenta (one learned push for all samples) and displacements."""
        return self.push.expand_as(x), x

    def leave(self, *state: Tensor) -> Tensor:
        """Return the last displacements."""
        return state[1]
