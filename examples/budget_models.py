"""Ordinary models for `budgets.py`, each with a batch and its loss, at sizes where a step takes a tenth of a second."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass
class Task:
    """A model, what it is called with, its loss, and its repeated blocks; `half`: under bf16 autocast; `compiled`: its
    blocks are.
    """

    model: nn.Module
    args: tuple[Any, ...]
    loss: Callable[[Any], Tensor]
    blocks: Callable[[Any], list[nn.Module]]
    kwargs: dict[str, Any] = field(default_factory=dict[str, Any])
    half: bool = False
    compiled: bool = False


def _square(out: Any) -> Tensor:
    return out.float().square().mean()


def _own_loss(out: Any) -> Tensor:
    return out.loss


def _cross_entropy(out: Tensor) -> Tensor:
    return F.cross_entropy(out.float(), torch.arange(out.shape[0]) % out.shape[1])


def _language(model: nn.Module, vocabulary: int, blocks: Callable[[Any], list[nn.Module]], half: bool) -> Task:
    ids = torch.randint(0, vocabulary, (4, 256))
    kwargs = {"input_ids": ids, "labels": ids, "use_cache": False}
    return Task(model.train(), (), _own_loss, blocks, kwargs, half)


def gpt2(short: bool, half: bool) -> Task:
    """Hugging Face's GPT-2, 8 layers of 256."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=8, n_embd=256, n_head=8, vocab_size=1024, n_positions=256)
    return _language(GPT2LMHeadModel(config), 1024, lambda m: [*m.transformer.h], half)


def llama(short: bool, half: bool) -> Task:
    """Hugging Face's Llama, 8 layers of 256."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=8, hidden_size=256, intermediate_size=688, num_attention_heads=8, vocab_size=1024,
        attention_dropout=0.1,
    )  # fmt: skip
    return _language(LlamaForCausalLM(config), 1024, lambda m: [*m.model.layers], half)


def vit(short: bool, half: bool) -> Task:
    """timm's ViT-S, 12 layers."""
    import timm

    model = timm.create_model("vit_small_patch16_224", num_classes=100, drop_rate=0.1, proj_drop_rate=0.1, img_size=128)
    return Task(model.train(), (torch.randn(8, 3, 128, 128),), _cross_entropy, lambda m: [*m.blocks], half=half)


def convnext(short: bool, half: bool) -> Task:
    """timm's ConvNeXt, atto."""
    import timm

    model = timm.create_model("convnext_atto", num_classes=100, drop_rate=0.1)
    blocks = lambda m: [b for s in m.stages for b in s.blocks]  # noqa: E731
    return Task(model.train(), (torch.randn(8, 3, 128, 128),), _cross_entropy, blocks, half=half)


def resnet50(short: bool, half: bool) -> Task:
    """torchvision's ResNet-50."""
    from torchvision.models import resnet50

    blocks = lambda m: [b for s in (m.layer1, m.layer2, m.layer3, m.layer4) for b in s]  # noqa: E731
    model = resnet50(num_classes=100).train()
    return Task(model, (torch.randn(8, 3, 96, 96),), _cross_entropy, blocks, half=half)


class UNet(nn.Module):
    """Four scales with skips, GroupNorm and SiLU."""

    def __init__(self, c: int = 16, scales: int = 4) -> None:
        super().__init__()

        def stage(a: int, b: int) -> nn.Sequential:
            parts = [(nn.Conv2d(x, b, 3, padding=1), nn.GroupNorm(4, b), nn.SiLU()) for x in (a, b)]
            return nn.Sequential(*parts[0], nn.Dropout(0.1), *parts[1])

        sizes = [c << i for i in range(scales)]
        self.down = nn.ModuleList(stage(a, b) for a, b in zip([3, *sizes], sizes, strict=False))
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, 2) for a, b in pairwise(sizes))
        self.join = nn.ModuleList(stage(2 * a, a) for a in sizes[:-1])
        self.out = nn.Conv2d(c, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        """An image as large as `x`."""
        skips: list[Tensor] = []
        for stage in self.down:
            x = stage(x if not skips else F.max_pool2d(x, 2))
            skips.append(x)
        for i in range(len(self.up) - 1, -1, -1):
            x = self.join[i](torch.cat([self.up[i](x), skips[i]], 1))
        return self.out(x)


def unet(short: bool, half: bool) -> Task:
    """A U-Net of four scales."""
    blocks = lambda m: [*m.down, *m.join]  # noqa: E731
    return Task(UNet().train(), (torch.randn(16, 3, 64, 64),), _square, blocks, half=half)


class Tagger(nn.Module):
    """Embedding, LSTM, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(1000, 128), nn.Linear(512, 20)
        self.lstm = nn.LSTM(128, 256, 3, batch_first=True, dropout=0.1, bidirectional=True)

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores, of tags."""
        return self.out(self.lstm(self.embed(tokens))[0]).mean(1)


def lstm(short: bool, half: bool) -> Task:
    """A tagger with a bidirectional LSTM."""
    tokens = torch.randint(0, 1000, (16, 64))
    return Task(Tagger().train(), (tokens,), _cross_entropy, lambda m: [m.lstm], half=half)


def encoder(short: bool, half: bool) -> Task:
    """`nn.TransformerEncoder`, 8 layers of 256."""
    d, layers, tokens = (64, 4, 64) if short else (256, 8, 128)
    layer = nn.TransformerEncoderLayer(d, 4, 4 * d, 0.1, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).train()
    return Task(model, (torch.randn(8, tokens, d),), _square, lambda m: [*m.layers], half=half)


class Couplings(nn.Module):
    """Two streams; each layer adds to one what it makes of the other."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        """Both streams."""
        a, b = x.chunk(2, 1)
        for f in self.layers:
            a, b = b, a + f(b)
        return torch.cat((a, b), 1)


def revnet(short: bool, half: bool) -> Task:
    """A RevNet of 24 couplings."""

    def layer(c: int = 16) -> nn.Module:
        return nn.Sequential(nn.BatchNorm2d(c), nn.ReLU(), nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c), nn.ReLU())

    model = Couplings([layer() for _ in range(24)]).train()
    return Task(model, (torch.randn(32, 32, 32, 32),), _square, lambda m: [*m.layers], half=half)


class Flow(nn.Module):
    """Affine couplings, and the logarithm of the determinant."""

    def __init__(self, d: int = 64, layers: int = 16) -> None:
        super().__init__()
        make = lambda: nn.Sequential(nn.Linear(d // 2, 256), nn.ReLU(), nn.Linear(256, d))  # noqa: E731
        self.layers = nn.ModuleList(make() for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        """The negative log-likelihood of each sample."""
        a, b = x.chunk(2, 1)
        logs = torch.zeros_like(a[:, 0])
        for f in self.layers:
            s, t = f(b).chunk(2, 1)
            s = s.tanh()
            a, b = b, a * s.exp() + t
            logs = logs + s.sum(1)
        return (a.square() + b.square()).sum(1) / 2 - logs


def flow(short: bool, half: bool) -> Task:
    """A RealNVP of 16 couplings."""
    return Task(Flow().train(), (torch.randn(4096, 64),), lambda out: out.mean(), lambda m: [*m.layers], half=half)


MODELS: Mapping[str, Callable[[bool, bool], Task]] = {
    f.__name__: f for f in (gpt2, llama, vit, convnext, resnet50, unet, lstm, encoder, revnet, flow)
}
