"""Models that train within a budget: each with its arguments and its loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import DEEP
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import revfx
from revfx.converted import conversion_of
from revfx.plan.model import tensors_in
from revfx.testing import measure_memory


Made = tuple[nn.Module, tuple[Any, ...], Callable[[Any], Tensor]]


def square(out: Any) -> Tensor:
    return (out[0] if isinstance(out, tuple) else out).square().mean()


class Residual(nn.Module):
    """`x + f(x)` for each of some layers, with `join` for the plus."""

    def __init__(self, *layers: nn.Module, join: Callable[[Tensor, Tensor], Tensor] = torch.add) -> None:
        super().__init__()
        self.layers, self.join = nn.ModuleList(layers), join

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.join(x, layer(x))
        return x


def branch(d: int = 64, act: type[nn.Module] = nn.GELU) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 4 * d), act(), nn.Dropout(0.1), nn.Linear(4 * d, d))


def mlp() -> Made:
    return Residual(*(branch() for _ in range(6))), (torch.randn(256, 64),), square


def relu_mlp() -> Made:
    return Residual(*(branch(act=nn.ReLU) for _ in range(6))), (torch.randn(256, 64),), square


def encoder(layers: int = 4 if DEEP else 2) -> Made:
    layer = nn.TransformerEncoderLayer(64, 4, 256, 0.1, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
    return model, (torch.randn(4, 64, 64),), square


def convolutions() -> Made:
    def layer() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True))

    return Residual(*(layer() for _ in range(6))), (torch.randn(8, 16, 16, 16),), square


class UNet(nn.Module):
    """Skips, GroupNorm, SiLU, pooling and transposed convolutions."""

    def __init__(self, c: int = 8) -> None:
        super().__init__()

        def block(a: int, b: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.GroupNorm(4, b), nn.SiLU())

        self.down = nn.ModuleList([block(3, c), block(c, 2 * c)])
        self.middle = block(2 * c, 4 * c)
        self.up = nn.ModuleList([nn.ConvTranspose2d(4 * c, 2 * c, 2, 2), nn.ConvTranspose2d(2 * c, c, 2, 2)])
        self.join = nn.ModuleList([block(4 * c, 2 * c), block(2 * c, c)])
        self.out = nn.Conv2d(c, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips: list[Tensor] = []
        for layer in self.down:
            x = layer(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.middle(x)
        for up, join in zip(self.up, self.join, strict=True):
            x = join(torch.cat([up(x), skips.pop()], 1))
        return self.out(x)


def unet() -> Made:
    return UNet(), (torch.randn(4, 3, 32, 32),), square


class Tagger(nn.Module):
    """Embedding, LSTM, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(50, 32), nn.Linear(128, 5)
        self.lstm = nn.LSTM(32, 64, 2, batch_first=True, dropout=0.1, bidirectional=True)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.lstm(self.embed(tokens))[0])


def tagger() -> Made:
    return Tagger(), (torch.randint(0, 50, (16, 32)),), square


def gru() -> Made:
    return nn.GRU(32, 64, 2, batch_first=True, dropout=0.1), (torch.randn(64, 16 if DEEP else 6, 32),), square


def in_place() -> Made:
    def joined(x: Tensor, h: Tensor) -> Tensor:
        y = torch.empty_like(h.relu_())
        y[:, ::2], y[:, 1::2] = h[:, ::2] * 2, h[:, 1::2].neg().exp()
        return x + y.tanh_().clone().mul_(0.5)

    return Residual(*(nn.Linear(64, 64) for _ in range(8)), join=joined), (torch.randn(256, 64),), square


def checkpointed() -> Made:
    class Checkpoint(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            return checkpoint(super().forward, input, use_reentrant=False)

    layers = (branch() if i % 2 else Checkpoint(*branch()) for i in range(6))
    return Residual(*layers), (torch.randn(256, 64),), square


class Exp(torch.autograd.Function):
    """A function of the user's that keeps its result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.exp()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * ctx.saved_tensors[0]


def functions() -> Made:
    def joined(x: Tensor, h: Tensor) -> Tensor:
        made: Any = Exp.apply(-h.abs())
        return x + made

    return Residual(*(nn.Linear(64, 64) for _ in range(8)), join=joined), (torch.randn(1024, 64),), square


def asking() -> Made:
    def joined(x: Tensor, h: Tensor) -> Tensor:
        return x + (h if h.abs().max().item() < 1e9 else h * 0)

    return Residual(*(branch() for _ in range(6)), join=joined), (torch.randn(256, 64),), square


def spectral() -> Made:
    norm: Any = nn.utils.parametrizations.spectral_norm
    layers = (nn.Sequential(norm(nn.Linear(64, 64)), nn.Tanh()) for _ in range(8))
    return Residual(*layers), (torch.randn(1024, 64),), square


class Attention(nn.MultiheadAttention):
    """Self-attention that gives its weights as well."""

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(x, x, x)[0]


def attention() -> Made:
    layers = (Attention(64, 4, dropout=0.1, batch_first=True) for _ in range(4))
    return Residual(*layers), (torch.randn(8, 32, 64),), square


class Translator(nn.Module):
    """A GRU cell with attention in a Python loop."""

    def __init__(self, d: int = 48, words: int = 200) -> None:
        super().__init__()
        self.embed, self.cell = nn.Embedding(words, d), nn.GRUCell(2 * d, d)
        self.query, self.out = nn.Linear(d, d), nn.Linear(2 * d, words)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory = self.embed(source)
        h, loss = memory[:, -1], memory.new_zeros(())
        for step in range(1, target.shape[1]):
            weights = torch.einsum("bd,bnd->bn", self.query(h), memory).softmax(-1)
            context = torch.einsum("bn,bnd->bd", weights, memory)
            h = self.cell(torch.cat([self.embed(target[:, step - 1]), context], -1), h)
            loss = loss + F.cross_entropy(self.out(torch.cat([h, context], -1)), target[:, step])
        return loss


def translator() -> Made:
    return Translator(), (torch.randint(0, 200, (32, 10)), torch.randint(0, 200, (32, 8))), torch.sum


MODELS: dict[str, Callable[[], Made]] = {
    "mlp": mlp, "relu": relu_mlp, "encoder": encoder, "convolutions": convolutions, "unet": unet, "lstm": tagger,
    "gru": gru, "in place": in_place, "checkpoint": checkpointed, "function": functions, "asks": asking,
    "spectral norm": spectral, "attention": attention, "translator": translator,
}  # fmt: skip


def make(name: str) -> Made:
    """Return a model with its arguments and its loss, the same each time."""
    torch.manual_seed(0)
    model, args, loss = MODELS[name]()
    return model.train(), args, loss


@pytest.fixture(autouse=True)
def quick_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a file that imports this, plans may be a little slower than the best: few of them are simulated."""
    monkeypatch.setattr("revfx.fit.local_search.MAX_SIMULATED_OPERATORS", 100_000 if DEEP else 20_000)


def state(model: nn.Module, step: Callable[[], Tensor], seed: int = 1) -> list[Tensor]:
    """Return what a step gives: the loss, gradients, buffers and the next random number; buffers are put back."""
    before = {name: b.clone() for name, b in model.named_buffers()}
    model.zero_grad(set_to_none=False)
    torch.manual_seed(seed)
    loss = step()
    loss.backward()
    found = [loss.detach().clone(), torch.rand(3)]
    found += [p.grad.clone() for p in model.parameters() if p.grad is not None]
    for name, b in model.named_buffers():
        found.append(b.clone())
        b.copy_(before[name])
    return found


def segformer() -> nn.Module:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    sizes, heads = [8, 16, 24, 32], [1, 2, 2, 4]
    config = SegformerConfig(depths=[1] * 4, hidden_sizes=sizes, decoder_hidden_size=16, num_attention_heads=heads)
    return SegformerForSemanticSegmentation(config)


def peak(model: nn.Module, step: Callable[[], Tensor]) -> int:
    """Return the bytes of the first step, of a model that has gradients already; buffers are put back."""
    before = {name: b.clone() for name, b in model.named_buffers()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    found = measure_memory(step, warm_up=False).peak
    for name, b in model.named_buffers():
        b.copy_(before[name])
    return found


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    """Return whether two steps gave the same, to the last bit."""
    return len(a) == len(b) and all(map(torch.equal, a, b))


def fit_of(model: nn.Module) -> Any:
    """The working object of a converted model with a budget."""
    return conversion_of(model).budgeted


def planned(model: nn.Module, args: Any, **options: Any) -> Any:
    """`convert`, with the plan for calls with `args` (a tensor, or a tuple of them) made by a step; nothing else of the
    step remains.
    """
    converted: Any = revfx.convert(model, **options)
    args = (args,) if isinstance(args, torch.Tensor) else tuple(args)
    buffers = [(b, b.clone()) for b in model.buffers()]
    gradients = [(p, p.grad) for p in model.parameters()]
    state = torch.get_rng_state()
    model.zero_grad()
    try:
        outs = [t for t in tensors_in(converted(*args)) if t.requires_grad]
        torch.autograd.backward([t.float().square().mean() for t in outs])
    finally:
        torch.set_rng_state(state)
        with torch.no_grad():
            for b, before in buffers:
                b.copy_(before)
        for p, gradient in gradients:
            p.grad = gradient
    return converted
