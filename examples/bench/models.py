"""The models of the bench by name: chains of reversible blocks, and ordinary models."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.chains import Chain, CouplingMlp, Flow, RevNet, Springs, Transformer


@dataclass
class Task:
    """A model in training mode, its arguments, the loss of its output, and its repeated blocks.

    `is_bf16`: the forward runs under bfloat16 autocast. `is_compiled`: each block is to be compiled by itself.
    `budget_bytes` is set by a way that trains within it.
    """

    model: nn.Module
    args: tuple[Tensor, ...]
    loss: Callable[[Any], Tensor]
    blocks: Sequence[nn.Module]
    kwargs: dict[str, Any] = field(default_factory=dict[str, Any])
    device: str = "cpu"
    is_bf16: bool = False
    is_compiled: bool = False
    budget_bytes: int | None = None

    def to(self, device: str) -> None:
        """Move the model and its arguments."""
        self.device = device
        self.model.to(device)
        self.args = tuple(t.to(device) for t in self.args)
        for name, value in self.kwargs.items():
            if isinstance(value, Tensor):
                self.kwargs[name] = value.to(device)

    def loss_of(self, call: Callable[..., Any]) -> Tensor:
        """Run a forward by `call` and return its loss."""
        if not self.is_bf16:
            return self.loss(call(*self.args, **self.kwargs))
        with torch.autocast(torch.device(self.device).type, torch.bfloat16):
            output = call(*self.args, **self.kwargs)
        return self.loss(output)


@dataclass(frozen=True)
class BenchModel:
    """A model by its name: how to build it for a depth and a batch, the default of each, and the package it needs."""

    name: str
    build: Callable[[int, int], Task]
    depth: int
    batch: int
    library: str = ""

    def make(self, depth: int | None = None, batch: int | None = None) -> Task:
        """Build the task, with equal weights and arguments in every call; torch's random generator stays as it is."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            task = self.build(depth or self.depth, batch or self.batch)
        task.model.train()
        return task


# --- losses
def square(output: Tensor) -> Tensor:
    """Return the mean of squares."""
    return output.float().square().mean()


def cross_entropy(logits: Tensor) -> Tensor:
    """Return the cross-entropy with classes 0, 1, 2, ... in turn."""
    rows = logits.float().flatten(0, -2)
    return F.cross_entropy(rows, torch.arange(len(rows), device=rows.device) % rows.shape[-1])


def own_loss(output: Any) -> Tensor:
    """Return the loss that the model computed."""
    return output.loss


# --- ordinary models
class UNet(nn.Module):
    """A U-Net: scales with skips, GroupNorm and SiLU; x: images (B, 3, H, W)."""

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
        """Return an image of the size of `x`."""
        skips: list[Tensor] = []
        for stage in self.down:
            x = stage(x if not skips else F.max_pool2d(x, 2))
            skips.append(x)
        for i in range(len(self.up) - 1, -1, -1):
            x = self.join[i](torch.cat([self.up[i](x), skips[i]], 1))
        return self.out(x)


class Tagger(nn.Module):
    """An embedding, a bidirectional LSTM and a linear layer; tokens: (B, T)."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(1000, 128), nn.Linear(512, 20)
        self.lstm = nn.LSTM(128, 256, layers, batch_first=True, dropout=0.1, bidirectional=True)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return scores (B, tags)."""
        return self.out(self.lstm(self.embed(tokens))[0]).mean(1)


# --- tasks: the names that `--models` takes
def _chain(make: Callable[[int], Chain], shape: tuple[int, ...], loss: Callable[[Any], Tensor]) -> Any:
    """Make a builder of tasks for a chain with normal inputs (B, *shape)."""

    def build(depth: int, batch: int) -> Task:
        model = make(depth)
        return Task(model, (torch.randn(batch, *shape),), loss, [*model.blocks])

    return build


def _transformer(depth: int, batch: int, d: int = 64, length: int = 64) -> Task:
    model = Transformer(depth, d)
    return Task(model, (torch.randint(0, 64, (batch, length)),), cross_entropy, [*model.blocks])


def _language(model: nn.Module, batch: int, blocks: Any) -> Task:
    ids = torch.randint(0, 1024, (batch, 256))
    return Task(model, (), own_loss, [*blocks], {"input_ids": ids, "labels": ids, "use_cache": False})


def _gpt2(depth: int, batch: int) -> Task:
    hf: Any = importlib.import_module("transformers")
    config = hf.GPT2Config(
        n_layer=depth, n_embd=256, n_head=8, vocab_size=1024, n_positions=256, bos_token_id=0, eos_token_id=0
    )
    model = hf.GPT2LMHeadModel(config)
    return _language(model, batch, model.transformer.h)


def _llama(depth: int, batch: int) -> Task:
    hf: Any = importlib.import_module("transformers")
    config = hf.LlamaConfig(
        num_hidden_layers=depth, hidden_size=256, intermediate_size=688, num_attention_heads=8, vocab_size=1024,
        attention_dropout=0.1,
    )  # fmt: skip
    model = hf.LlamaForCausalLM(config)
    return _language(model, batch, model.model.layers)


def _vit(depth: int, batch: int) -> Task:
    timm: Any = importlib.import_module("timm")
    options = {"num_classes": 100, "drop_rate": 0.1, "proj_drop_rate": 0.1, "img_size": 128, "depth": depth}
    model = timm.create_model("vit_small_patch16_224", **options)
    return Task(model, (torch.randn(batch, 3, 128, 128),), cross_entropy, [*model.blocks])


def _convnext(depth: int, batch: int) -> Task:
    timm: Any = importlib.import_module("timm")
    model = timm.create_model("convnext_atto", num_classes=100, drop_rate=0.1, depths=(2, 2, depth, 2))
    blocks = [block for stage in model.stages for block in stage.blocks]
    return Task(model, (torch.randn(batch, 3, 128, 128),), cross_entropy, blocks)


def _resnet50(depth: int, batch: int) -> Task:
    resnet: Any = importlib.import_module("torchvision.models.resnet")
    model = resnet.ResNet(resnet.Bottleneck, [3, 4, depth, 3], num_classes=100)
    blocks = [*model.layer1, *model.layer2, *model.layer3, *model.layer4]
    return Task(model, (torch.randn(batch, 3, 96, 96),), cross_entropy, blocks)


def _unet(depth: int, batch: int) -> Task:
    model = UNet(scales=depth)
    return Task(model, (torch.randn(batch, 3, 64, 64),), square, [*model.down, *model.join])


def _lstm(depth: int, batch: int) -> Task:
    model = Tagger(depth)
    return Task(model, (torch.randint(0, 1000, (batch, 64)),), cross_entropy, [model.lstm])


def _encoder(depth: int, batch: int) -> Task:
    layer = nn.TransformerEncoderLayer(256, 4, 1024, 0.1, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
    return Task(model, (torch.randn(batch, 128, 256),), square, [*model.layers])


def _negative_mean(log_density: Tensor) -> Tensor:
    return -log_density.mean()


MODELS: Mapping[str, BenchModel] = {m.name: m for m in (
    BenchModel("mlp", _chain(CouplingMlp, (32,), square), 16, 2048),
    BenchModel("revnet", _chain(RevNet, (3, 16, 16), cross_entropy), 8, 64),
    BenchModel("transformer", _transformer, 8, 32),
    BenchModel("flow", _chain(Flow, (64,), _negative_mean), 16, 4096),
    BenchModel("leapfrog", _chain(Springs, (128,), square), 16, 256),
    BenchModel("encoder", _encoder, 8, 8),
    BenchModel("lstm", _lstm, 3, 16),
    BenchModel("unet", _unet, 4, 16),
    BenchModel("gpt2", _gpt2, 8, 4, "transformers"),
    BenchModel("llama", _llama, 8, 4, "transformers"),
    BenchModel("resnet50", _resnet50, 6, 8, "torchvision"),  # depth: of the third stage
    BenchModel("vit", _vit, 12, 8, "timm"),
    BenchModel("convnext", _convnext, 6, 8, "timm"),  # depth: of the third stage
)}  # fmt: skip

# The chains so narrow that a step takes the host's time. Streams have 8 KiB, as revfx makes no codes of 4 KiB or less.
TINY_MODELS: Mapping[str, BenchModel] = {m.name: m for m in (
    BenchModel("mlp", _chain(partial(CouplingMlp, features=8, width=8), (8,), square), 16, 256),
    BenchModel("revnet", _chain(partial(RevNet, channels=4), (3, 8, 8), cross_entropy), 8, 8),
    BenchModel("transformer", partial(_transformer, d=16, length=16), 8, 8),
    BenchModel("flow", _chain(partial(Flow, width=8, hidden=32), (16,), _negative_mean), 16, 256),
    BenchModel("leapfrog", _chain(partial(Springs, masses=16, hidden=4), (16,), square), 16, 128),
)}  # fmt: skip
