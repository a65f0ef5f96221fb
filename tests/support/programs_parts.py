"""The modules that random programs are built of: what f may be, and what it may do besides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint


HIDDEN = 3


def mlp(d: int, out: int) -> nn.Module:
    return nn.Sequential(nn.Linear(d, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, out))


def relu_first(d: int, out: int) -> nn.Module:
    """Whose gradient jumps where its input changes sign: it shows zeros that came back as +-1e-17."""
    return nn.Sequential(nn.ReLU(), nn.Linear(d, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, out))


def relu_last(d: int, out: int) -> nn.Module:
    return nn.Sequential(nn.Linear(d, out), nn.ReLU())


def dropped(d: int, out: int) -> nn.Module:
    """Which adds nothing to elements of the other stream: they keep the numbers that they have."""
    return nn.Sequential(nn.Linear(d, out), nn.Dropout(0.5))


def unbiased(d: int, out: int) -> nn.Module:
    """Which adds nothing where the other stream is zero."""
    return nn.Linear(d, out, bias=False)


def noisy(d: int, out: int) -> nn.Module:
    return nn.Sequential(nn.Linear(d, HIDDEN), nn.Dropout(0.4), nn.Tanh(), nn.Linear(HIDDEN, out))


def layer_normed(d: int, out: int) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(d), nn.Linear(d, out), nn.GELU())


def batch_normed(d: int, out: int) -> nn.Module:
    return nn.Sequential(nn.Linear(d, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU(inplace=True), nn.Linear(HIDDEN, out))


def averaged(d: int, out: int) -> nn.Module:
    """A BatchNorm without momentum, whose running statistics depend on how often it ran."""
    return nn.Sequential(nn.Linear(d, out), nn.BatchNorm1d(out, momentum=None))


def spectral(d: int, out: int) -> nn.Module:
    return nn.Sequential(parametrizations.spectral_norm(nn.Linear(d, out)), nn.Tanh())


def weight_normed(d: int, out: int) -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(d, out)), nn.Tanh())


def frozen(d: int, out: int) -> nn.Module:
    return mlp(d, out).requires_grad_(False)


def half_frozen(d: int, out: int) -> nn.Module:
    module = nn.Sequential(nn.Linear(d, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, out))
    module[0].requires_grad_(False)
    return module


def single(d: int, out: int) -> nn.Module:
    """Computes in single precision and returns it: the sum is still in double."""
    return nn.Sequential(Single(), nn.Linear(d, out, dtype=torch.float32), nn.Tanh())


class Single(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float()


class Inplace(nn.Module):
    """Writes to its own temporaries, through views as well."""

    def __init__(self, d: int, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(d, out)

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x) * 1.5
        flat = h.view(-1)
        flat[:1] = 0.25
        h += 0.5
        return h.sigmoid_()


class Kinked(nn.Module):
    """Whose gradient jumps where its input is a half, or one, or equal to something else."""

    def __init__(self, d: int, out: int) -> None:
        super().__init__()
        self.f, self.g, self.h = (nn.Linear(d, out) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.f(F.hardtanh(x)) + self.g(x.clamp(max=0.5)) + self.h(F.hardshrink(x))


class Compares(nn.Module):
    """What it adds depends on which of its input's elements are equal, zero or whole."""

    def __init__(self, d: int, out: int) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(d, out), nn.Linear(d, out)

    def forward(self, x: Tensor) -> Tensor:
        equal = (x == x.roll(1, -1)).to(x.dtype)
        return self.f(x * (x != 0)) + 0.3 * self.g(equal * x) + 0.1 * self.f(x.sign() * x.floor())


class Skips(nn.Module):
    """Stochastic depth: what a function of normalised rows gives is dropped for whole rows."""

    def __init__(self, d: int, out: int) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(d), nn.Linear(d, HIDDEN)
        self.last = nn.Linear(HIDDEN, out)
        nn.init.zeros_(self.inner.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.last(torch.relu(self.inner(torch.relu(self.norm(x)))))
        return h * torch.bernoulli(torch.full((len(x), *[1] * (x.dim() - 1)), 0.5, dtype=x.dtype))


class Kernels(nn.Module):
    """Differences of neighbours, by a kernel that is no parameter, and signs in the place of weights."""

    kernel: Tensor

    def __init__(self, d: int, out: int) -> None:
        super().__init__()
        self.weight, self.last = nn.Parameter(torch.randn(HIDDEN, d)), nn.Linear(HIDDEN, out)
        self.register_buffer("kernel", torch.eye(d) - torch.eye(d).roll(1, 0))

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(torch.relu(F.linear(x, self.kernel)), self.weight)
        return self.last(torch.relu(F.linear(x, self.weight.sign() + self.weight - self.weight.detach()) * 0.5 + h))


class OnInput(nn.Module):
    """Writes to what it is given."""

    def __init__(self, d: int, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(d, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.mul_(0.5)).tanh()


class Passes(nn.Module):
    """Returns its very input, or a view of it."""

    def __init__(self, d: int, out: int) -> None:
        super().__init__()
        self.same = d == out

    def forward(self, x: Tensor) -> Tensor:
        return x if self.same else x[..., :1]


class Repeats(nn.Module):
    """Returns an expanded tensor, whose elements share memory."""

    def __init__(self, d: int, out: int) -> None:
        super().__init__()
        self.linear, self.out = nn.Linear(d, 1), out

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x)).expand(*x.shape[:-1], self.out)


class Turned(nn.Module):
    """Returns a tensor that is not contiguous."""

    def __init__(self, d: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out, d) * 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.weight @ x.transpose(-1, -2)).transpose(-1, -2)


class Selects(nn.Module):
    """Adds what integers choose: an embedding of the largest element's place, sorted and accumulated values."""

    def __init__(self, d: int, out: int) -> None:
        super().__init__()
        self.table, self.linear = nn.Embedding(max(d, 1), out), nn.Linear(d, out)

    def forward(self, x: Tensor) -> Tensor:
        top = x.topk(1, -1).values
        return self.table(x.argmax(-1)) * 0.3 + torch.tanh(self.linear(x.sort(-1).values)) + 0.1 * top


class Remembers(nn.Module):
    """Reads a buffer, uses it, and writes it."""

    mean: Tensor
    calls: Tensor

    def __init__(self, d: int, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(d, out)
        self.register_buffer("mean", torch.zeros(out))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.linear(x)) - self.mean
        with torch.no_grad():
            self.calls += 1
            self.mean.mul_(0.5).add_(h.flatten(0, -2).sum(0), alpha=0.1)
        return h * (1 + 0.1 * self.calls)


class Raises(nn.Module):
    """Draws, writes a buffer and then raises, while it is armed."""

    def __init__(self, d: int, out: int) -> None:
        super().__init__()
        self.inner, self.norm, self.armed = noisy(d, out), nn.BatchNorm1d(out), False

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.inner(x)) if x.dim() == 2 and x.shape[0] > 1 else self.inner(x)
        if self.armed:
            raise KeyError(f"armed {tuple(x.shape)}")
        return h


class Checkpoints(nn.Module):
    def __init__(self, d: int, out: int) -> None:
        super().__init__()
        self.inner = noisy(d, out)

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.inner, x, use_reentrant=False)


def doubled(module: nn.Module, args: Any, result: Tensor) -> Tensor:
    return result * 2


class Hooked(nn.Module):
    """Hooks before, after and in the backward."""

    def __init__(self, d: int, out: int) -> None:
        super().__init__()
        self.inner = mlp(d, out)
        self.inner.register_forward_pre_hook(lambda m, args: (args[0] * 0.5,))
        self.inner.register_forward_hook(doubled)
        self.inner.register_full_backward_hook(lambda m, of_inputs, of_outputs: (of_inputs[0] * 1.5,))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Squares(torch.autograd.Function):
    """A function with a backward of its own, which saves an input and an output."""

    @staticmethod
    def forward(ctx: Any, *args: Any, **kwargs: Any) -> Tensor:
        (x,) = args
        y = torch.tanh(x * x)
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, y = ctx.saved_tensors
        return grads[0] * (1 - y * y) * 2 * x


class Custom(nn.Module):
    def __init__(self, d: int, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(d, out)

    def forward(self, x: Tensor) -> Any:
        return Squares.apply(self.linear(x))


class Stops(nn.Module):
    """No gradient passes through half of it."""

    def __init__(self, d: int, out: int) -> None:
        super().__init__()
        self.f, self.g = mlp(d, out), mlp(d, out)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = self.f(x)
        return h * self.g(x.detach())


class Branches(nn.Module):
    """Chooses by the values that it sees."""

    def __init__(self, d: int, out: int) -> None:
        super().__init__()
        self.f, self.g = mlp(d, out), nn.Linear(d, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x) if float(x.detach().sum()) > 0 else torch.tanh(self.g(x))


class Attends(nn.Module):
    def __init__(self, d: int, out: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(d, 6), nn.Linear(2, out)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q, k, v))


class Nested(nn.Module):
    """Couplings inside of f."""

    def __init__(self, d: int, out: int) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(d, 4), nn.Linear(4, out)
        self.f = nn.ModuleList(mlp(2, 2) for _ in range(3))
        self.g = nn.ModuleList(noisy(2, 2) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.enter(x).chunk(2, -1)
        for f, g in zip(self.f, self.g, strict=True):
            a = a + f(b)
            b = b + g(a)
        return self.leave(torch.cat([a, b], -1))


class Sided(nn.Module):
    """Takes a second argument, whatever it is a tensor or a list of."""

    def __init__(self, d: int, out: int, side: int) -> None:
        super().__init__()
        self.inner, self.side = mlp(d, out), nn.Linear(side, out)

    def forward(self, x: Tensor, side: Any) -> Tensor:
        return self.inner(x) * torch.sigmoid(self.side(side[0] if isinstance(side, list) else side))


class Splits(nn.Module):
    """Returns a pair: a factor and a shift, as conditioners of affine couplings do."""

    def __init__(self, d: int, out: int) -> None:
        super().__init__()
        self.inner = mlp(d, 2 * out)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        s, t = self.inner(x).chunk(2, -1)
        return torch.exp(0.5 * torch.tanh(s)), t


class Block(nn.Module):
    """One coupling as a module of two streams, which changes its first one."""

    def __init__(self, d: int, out: int) -> None:
        super().__init__()
        self.f = mlp(d, out)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return b, a + self.f(b)


class CatSplit(nn.Module):
    """A coupling within one tensor, in one of a few ways."""

    mask: Tensor

    def __init__(self, d: int, kind: int) -> None:
        super().__init__()
        self.first, self.kind = d // 2, kind
        self.f, self.g = mlp(d - self.first, self.first), relu_first(self.first, d - self.first)
        self.whole = noisy(d, d)
        self.register_buffer("mask", torch.arange(d) % 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == 0:
            a, b = x[..., : self.first], x[..., self.first :]
            a = a + self.f(b)
            return torch.cat([a, b + self.g(a)], -1)
        if self.kind == 1:
            a, b = x.split([self.first, x.shape[-1] - self.first], -1)
            return torch.cat([b, a * factor(self.f(b))], -1)
        if self.kind == 2:
            return torch.where(self.mask == 1, x, x + self.whole(x * self.mask))
        b = x[..., self.first :]
        y = x.clone()
        y[..., : self.first] += self.f(b)
        return y.flip(-1)


class LogDet(nn.Module):
    """A layer of a flow: the result, and the logarithm of the determinant so far."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.first = d // 2
        self.net = Splits(d - self.first, self.first)

    def forward(self, x: Tensor, log: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x[..., : self.first], x[..., self.first :]
        s, t = self.net(b)
        return torch.cat([b, a * s + t], -1), log + s.log().sum()


class Momentum(nn.Module):
    """A residual layer with momentum."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.f, self.gamma = mlp(d, d), 0.8

    def forward(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        v = self.gamma * v + self.f(x)
        return x + v, v


class Convolves(nn.Module):
    def __init__(self, c: int, out: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(c, 2, 3, padding=1, bias=False), nn.BatchNorm2d(2), nn.ReLU())
        self.last = nn.Conv2d(2, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(x))


def convolution(c: int, out: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(c, out, 3, padding=1), nn.Tanh())


def pooled(c: int, out: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(c, out, 1), nn.MaxPool2d(3, 1, 1))


def factor(s: Tensor, kind: str = "exp") -> Tensor:
    """A positive factor, from a function that dynamo and the recorder see through."""
    return torch.exp(0.5 * torch.tanh(s)) if kind == "exp" else torch.sigmoid(s) + 0.5


Part = Callable[[int, int], nn.Module]
# f of vectors: the first ones twice, as ordinary functions should be the most
PLAIN: tuple[Part, ...] = (mlp, mlp, relu_first, relu_first, relu_last, noisy, layer_normed, Turned, Nested, frozen)
ODD: tuple[Part, ...] = (
    batch_normed, averaged, spectral, weight_normed, half_frozen, single, Inplace, Passes, Repeats, Selects, Remembers,
    Raises, Checkpoints, Hooked, Kinked, Kinked, Compares, Compares, Custom, Stops, Attends, dropped, dropped, unbiased,
    Skips, Skips, Kernels,
)  # fmt: skip
RARE: tuple[Part, ...] = (OnInput,)
IMAGES: tuple[Part, ...] = (Convolves, convolution, pooled)
