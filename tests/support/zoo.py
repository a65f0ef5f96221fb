"""Reversible models as their authors would write them, with no thought of revfx: the programs that must be found."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


D = 16  # width of one stream


def mlp(d: int = D) -> nn.Sequential:
    return nn.Sequential(nn.Linear(d, 2 * d), nn.Tanh(), nn.Linear(2 * d, d))


class Pairs(nn.Module):
    """`depth` pairs of functions f, g."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.f = nn.ModuleList(mlp() for _ in range(depth))
        self.g = nn.ModuleList(mlp() for _ in range(depth))


class Additive(Pairs):
    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for f, g in zip(self.f, self.g, strict=True):
            a = a + f(b)
            b = b + g(a)
        return torch.cat([a, b], -1)


class InPlace(Pairs):
    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for f, g in zip(self.f, self.g, strict=True):
            h = f(b)
            h += a
            a = h
            h = g(a)
            b = h.mul_(0.5).add_(b)
        return torch.cat([a, b], -1)


class AffineExp(Pairs):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x.chunk(2, -1)
        log_det = torch.zeros(x.shape[0], dtype=x.dtype, device=x.device)
        for f, g in zip(self.f, self.g, strict=True):
            s = 0.5 * torch.tanh(f(b))
            a = a * torch.exp(s) + g(b)
            log_det = log_det + s.sum(-1)
            a, b = b, a
        return torch.cat([a, b], -1), log_det


class HalfPerBlock(nn.Module):
    """One half changes per block and the halves are swapped by `cat`, as in RealNVP and Glow."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.nets = nn.ModuleList(mlp() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for i, net in enumerate(self.nets):
            a, b = x.chunk(2, -1)
            b = b * torch.exp(0.1 * torch.tanh(net(a)))
            x = torch.cat([b + net(a) if i % 2 else b, a], -1)
        return x


class AffineSigmoid(Pairs):
    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for f, g in zip(self.f, self.g, strict=True):
            a = (a + g(b)) * (torch.sigmoid(f(b)) + 0.5)
            a, b = b, a
        return torch.cat([a, b], -1)


class Momentum(nn.Module):
    def __init__(self, depth: int, gamma: float = 0.9) -> None:
        super().__init__()
        self.f = nn.ModuleList(mlp(2 * D) for _ in range(depth))
        self.gamma = gamma

    def forward(self, x: Tensor) -> Tensor:
        v = torch.zeros_like(x)
        for f in self.f:
            v = self.gamma * v + (1 - self.gamma) * f(x)
            x = x + v
        return x + v


class Leapfrog(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.force = nn.ModuleList(mlp() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        q, p = x.chunk(2, -1)
        for force in self.force:
            p = p - 0.05 * force(q)
            q = q + 0.1 * p
            p = p - 0.05 * q
        return torch.cat([q, p], -1)


class Midpoint(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.f = nn.ModuleList(mlp(2 * D) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        before, now = x, x + 0.1 * torch.tanh(x)
        for f in self.f:
            before, now = now, before + 0.2 * f(now)
        return torch.cat([before, now], -1)


class FourStreams(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.f = nn.ModuleList(mlp(D // 2) for _ in range(4 * depth))

    def forward(self, x: Tensor) -> Tensor:
        s = list(x.chunk(4, -1))
        for i, f in enumerate(self.f):
            s[i % 4] = s[i % 4] + f(s[(i + 1) % 4])
        return torch.cat(s, -1)


class CatSplitBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = mlp(), mlp()

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.split(x, x.shape[-1] // 2, dim=-1)
        a = a + self.f(b)
        b = b + self.g(a)
        return torch.cat((a, b), dim=-1)


class CatSplit(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(CatSplitBlock() for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class Slices(Pairs):
    def forward(self, x: Tensor) -> Tensor:
        h = x.size(-1) // 2
        for f, g in zip(self.f, self.g, strict=True):
            a, b = x[..., :h], x[..., h:]
            a = a + f(b)
            x = torch.cat([a, b + g(a)], dim=-1)
        return x


class Masked(nn.Module):
    """Masked affine couplings, with `where` and a mask that is a buffer."""

    mask: Tensor

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.f = nn.ModuleList(mlp(2 * D) for _ in range(depth))
        self.g = nn.ModuleList(mlp(2 * D) for _ in range(depth))
        self.register_buffer("mask", torch.arange(2 * D) % 2 == 0)

    def forward(self, x: Tensor) -> Tensor:
        for i, (f, g) in enumerate(zip(self.f, self.g, strict=True)):
            mask = self.mask if i % 2 else ~self.mask
            kept = torch.where(mask, x, 0.0)
            scale = torch.exp(0.3 * torch.tanh(f(kept)))
            x = torch.where(mask, x, x * scale + g(kept))
        return x


class ChannelShuffle(Pairs):
    order: Tensor

    def __init__(self, depth: int) -> None:
        super().__init__(depth)
        self.register_buffer("order", torch.randperm(2 * D))

    def forward(self, x: Tensor) -> Tensor:
        for i, (f, g) in enumerate(zip(self.f, self.g, strict=True)):
            a, b = x.chunk(2, dim=-1)
            a = a + f(b)
            b = b + g(a)
            x = torch.cat([a, b], -1)
            x = x[:, self.order] if i % 2 else x.flip(-1).roll(3, -1)
        return x


class SideInputs(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.condition = nn.Linear(2 * D, D)
        self.f = nn.ModuleList(nn.Linear(2 * D, D) for _ in range(depth))
        self.g = nn.ModuleList(nn.Linear(2 * D, D) for _ in range(depth))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        side = torch.tanh(self.condition(context))
        a, b = x.chunk(2, -1)
        for f, g in zip(self.f, self.g, strict=True):
            a = a + torch.tanh(f(torch.cat([b, side], -1)))
            b = b + torch.tanh(g(torch.cat([a, side], -1)))
        return torch.cat([a, b], -1)


class SharedWeights(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.f, self.g, self.depth = mlp(), mlp(), depth

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for _ in range(self.depth):
            a = a + self.f(b)
            b = b + self.g(a)
        return torch.cat([a, b], -1)


class Dropout(Pairs):
    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for f, g in zip(self.f, self.g, strict=True):
            a = a + F.dropout(f(b), 0.2, self.training)
            b = b + F.dropout(g(a), 0.2, self.training)
        return torch.cat([a, b], -1)


def conv_bn(c: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(c, c, 3, padding=1, bias=False),
        nn.BatchNorm2d(c),
        nn.ReLU(),
        nn.Conv2d(c, c, 3, padding=1, bias=False),
        nn.BatchNorm2d(c),
    )


class RevConvBlock(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.f, self.g = conv_bn(c), conv_bn(c)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        a = a + self.f(b)
        return a, b + self.g(a)


class ConvBN(nn.Module):
    def __init__(self, depth: int, c: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 2 * c, 3, padding=1)
        self.blocks = nn.ModuleList(RevConvBlock(c) for _ in range(depth))
        self.head = nn.Linear(2 * c, 5)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.stem(x).chunk(2, 1)
        for block in self.blocks:
            a, b = block(a, b)
        return self.head(torch.cat([a, b], 1).mean((2, 3)))


class TwoStages(nn.Module):
    """Half of the blocks at each resolution."""

    def __init__(self, depth: int, c: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 2 * c, 3, padding=1)
        self.first = nn.ModuleList(RevConvBlock(c) for _ in range(depth // 2))
        self.down = nn.Conv2d(2 * c, 4 * c, 3, stride=2, padding=1)
        self.second = nn.ModuleList(RevConvBlock(2 * c) for _ in range(depth // 2))
        self.head = nn.Linear(4 * c, 5)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.stem(x).chunk(2, 1)
        for block in self.first:
            a, b = block(a, b)
        a, b = self.down(torch.cat([a, b], 1)).chunk(2, 1)
        for block in self.second:
            a, b = block(a, b)
        return self.head(F.relu(torch.cat([a, b], 1)).mean((2, 3)))


class Attention(nn.Module):
    def __init__(self, d: int, heads: int = 4) -> None:
        super().__init__()
        self.norm, self.qkv, self.out, self.heads = nn.LayerNorm(d), nn.Linear(d, 3 * d), nn.Linear(d, d), heads

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(self.norm(x)).view(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(n, t, d))


class Transformer(nn.Module):
    def __init__(self, depth: int, d: int = D, vocabulary: int = 20, length: int = 12) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, d)
        self.position = nn.Parameter(torch.randn(length, d) * 0.1)
        self.attention = nn.ModuleList(Attention(d) for _ in range(depth))
        self.feed = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d)) for _ in range(depth)
        )
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embedding(tokens) + self.position[: tokens.shape[1]]
        a = b = h
        for attention, feed in zip(self.attention, self.feed, strict=True):
            a = a + attention(b)
            b = b + feed(a)
        return self.head(self.norm((a + b) / 2))


def vectors(n: int) -> tuple[Tensor, ...]:
    return (torch.randn(n, 2 * D),)


def vectors_and_context(n: int) -> tuple[Tensor, ...]:
    return torch.randn(n, 2 * D), torch.randn(n, 2 * D)


def images(n: int) -> tuple[Tensor, ...]:
    return (torch.randn(max(2, n // 16), 3, 8, 8),)


def tokens(n: int) -> tuple[Tensor, ...]:
    return (torch.randint(0, 20, (max(2, n // 8), 12)),)


ZOO: dict[str, tuple[Callable[[int], nn.Module], Callable[[int], tuple[Tensor, ...]]]] = {
    "additive": (Additive, vectors),
    "in place": (InPlace, vectors),
    "affine exp": (AffineExp, vectors),
    "half per block": (HalfPerBlock, vectors),
    "affine sigmoid": (AffineSigmoid, vectors),
    "momentum": (Momentum, vectors),
    "leapfrog": (Leapfrog, vectors),
    "midpoint": (Midpoint, vectors),
    "four streams": (FourStreams, vectors),
    "cat/split per block": (CatSplit, vectors),
    "slices": (Slices, vectors),
    "masked by where": (Masked, vectors),
    "channel shuffle": (ChannelShuffle, vectors),
    "side inputs": (SideInputs, vectors_and_context),
    "shared weights": (SharedWeights, vectors),
    "dropout": (Dropout, vectors),
    "conv+BN": (ConvBN, images),
    "two stages": (TwoStages, images),
    "transformer": (Transformer, tokens),
}
