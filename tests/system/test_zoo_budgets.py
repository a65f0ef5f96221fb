"""Models as their authors wrote them, trained within budgets of memory: plain PyTorch's bits, below the peak."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from fit_models import equal
from helpers import deep_but
from torch import Tensor, nn
from torch.nn import functional as F

import revfx
from revfx.testing import measure_memory


STEPS, SHARES, LEAST = 3, (0.8, 0.6, 0.4), 1.02
Arguments = dict[str, Any]
Training = tuple[list[Tensor], list[int]]  # what some steps gave, and the bytes that each took at its peak


class Made(NamedTuple):
    """A model, what draws the keyword arguments of a step, and the loss of what the model returns."""

    model: nn.Module
    draw: Callable[[], Arguments]
    loss: Callable[[Any], Tensor]


def square(out: Tensor) -> Tensor:
    return out.square().mean()


def classes(out: Tensor) -> Tensor:
    return F.cross_entropy(out, torch.arange(len(out)) % out.shape[1])


# --- Hugging Face's transformers
def tokens(*shape: int, vocabulary: int = 300) -> Tensor:
    return torch.randint(5, vocabulary, shape)


def labelled(shape: tuple[int, ...] = (4, 64)) -> Arguments:
    """Tokens that are labels as well, the last ones of one row being padding."""
    ids = tokens(*shape)
    mask = torch.ones(shape, dtype=torch.long)
    mask[-1, -8:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def of_transformers(
    name: str, head: str, draw: Callable[[], Arguments] = labelled, attention: str | None = None, **options: Any
) -> Made:
    transformers: Any = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(**options)
    config._attn_implementation = attention  # the fastest one that the model has, if None
    return Made(getattr(transformers, name + head)(config), draw, attrgetter("loss"))


SMALL: Arguments = {  # of most configurations
    "vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 256,
}  # fmt: skip
GROUPED: Arguments = SMALL | {"num_key_value_heads": 2, "attention_dropout": 0.1, "head_dim": 16}
GPT2: Arguments = {"vocab_size": 300, "n_embd": 64, "n_layer": 4, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}
PAIRED: Arguments = {  # of encoders with decoders
    "vocab_size": 300, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 256,
    "decoder_ffn_dim": 256, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
}  # fmt: skip

decoder = partial(of_transformers, head="ForCausalLM")
encoder = partial(of_transformers, head="ForMaskedLM", **SMALL)
brief = partial(labelled, (2, 24))


def vision(name: str, **options: Any) -> Made:
    draw = lambda: {"pixel_values": torch.randn(4, 3, 64, 64), "labels": torch.randint(0, 10, (4,))}  # noqa: E731
    return of_transformers(name, "ForImageClassification", draw, num_labels=10, **options)


def seq2seq(name: str, **options: Any) -> Made:
    draw = lambda: {"input_ids": tokens(4, 48), "labels": tokens(4, 32)}  # noqa: E731
    return of_transformers(name, "ForConditionalGeneration", draw, **options)


def whisper() -> Made:
    draw = lambda: {"input_features": torch.randn(4, 80, 128), "labels": tokens(4, 24)}  # noqa: E731
    return of_transformers(
        "Whisper", "ForConditionalGeneration", draw, dropout=0.1,
        max_source_positions=64, max_target_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None, **PAIRED,
    )  # fmt: skip


def wav2vec2() -> Made:
    draw = lambda: {"input_values": torch.randn(2, 6000), "labels": tokens(2, 6, vocabulary=30)}  # noqa: E731
    sizes: Arguments = {"conv_dim": (32,) * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
    return of_transformers("Wav2Vec2", "ForCTC", draw, **SMALL | {"vocab_size": 32}, **sizes, mask_time_length=2)


def segformer() -> Made:
    draw = lambda: {"pixel_values": torch.randn(2, 3, 128, 128), "labels": tokens(2, 128, 128, vocabulary=9)}  # noqa: E731
    sizes: Arguments = {"hidden_sizes": [16, 32, 40, 64], "num_attention_heads": [1, 2, 2, 4], "depths": [1] * 4}
    return of_transformers("Segformer", "ForSemanticSegmentation", draw, decoder_hidden_size=32, num_labels=9, **sizes)


def detr() -> Made:
    transformers: Any = pytest.importorskip("transformers")
    pytest.importorskip("scipy")  # matches boxes

    def draw() -> Arguments:
        boxes = [{"class_labels": torch.randint(0, 5, (n,)), "boxes": 0.2 + 0.3 * torch.rand(n, 4)} for n in (2, 3)]
        return {"pixel_values": torch.randn(2, 3, 192, 192), "labels": boxes}

    backbone = transformers.ResNetConfig(
        embedding_size=32, hidden_sizes=[32, 64, 64, 64], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage4"],
    )  # fmt: skip
    return of_transformers(
        "Detr", "ForObjectDetection", draw, backbone_config=backbone, use_timm_backbone=False, backbone=None,
        use_pretrained_backbone=False, num_queries=20, num_labels=5, **PAIRED,
    )  # fmt: skip


def clip() -> Made:
    transformers: Any = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
    text = sizes | {"vocab_size": 300, "bos_token_id": 3, "eos_token_id": 4, "attention_dropout": 0.1}
    config = transformers.CLIPConfig(text_config=text, vision_config=sizes | {"image_size": 64, "patch_size": 8})
    draw = lambda: {"input_ids": tokens(8, 32), "pixel_values": torch.randn(8, 3, 64, 64), "return_loss": True}  # noqa: E731
    return Made(transformers.CLIPModel(config), draw, attrgetter("loss"))


def lora() -> Made:
    """GPT-2 whose weights are frozen, but for products of low rank beside them."""
    peft: Any = pytest.importorskip("peft")
    base = of_transformers("GPT2", "LMHeadModel", **GPT2).model
    config = peft.LoraConfig(r=4, target_modules=["c_attn", "c_proj"], lora_dropout=0.1, fan_in_fan_out=True)
    return Made(peft.get_peft_model(base, config), labelled, attrgetter("loss"))


# --- convolutions and others: timm, torchvision, diffusers
def images(n: int, size: int) -> Callable[[], Arguments]:
    return lambda: {"x": torch.randn(n, 3, size, size)}


def of_timm(name: str, size: int = 64, n: int = 4, **options: Any) -> Made:
    timm: Any = pytest.importorskip("timm")
    return Made(timm.create_model(name, num_classes=10, **options), images(n, size), classes)


def of_torchvision(name: str, n: int = 4, loss: Callable[[Any], Tensor] = classes, **options: Any) -> Made:
    models: Any = pytest.importorskip("torchvision.models")
    return Made(getattr(models, name)(num_classes=10, **options), images(n, 64), loss)


def deeplab() -> Made:
    segmentation: Any = pytest.importorskip("torchvision.models.segmentation")
    model = segmentation.deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=5)
    return Made(model, images(2, 96), lambda out: square(out["out"]))


def faster_rcnn() -> Made:
    detection: Any = pytest.importorskip("torchvision.models.detection")
    model = detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=5, min_size=96, max_size=128, box_batch_size_per_image=32,
        rpn_pre_nms_top_n_train=200, rpn_post_nms_top_n_train=50,
    )  # fmt: skip

    def draw() -> Arguments:
        corner = 60 * torch.rand(3, 2)
        target = {"boxes": torch.cat([corner, corner + 30], 1), "labels": torch.randint(1, 5, (3,))}
        return {"images": [torch.rand(3, 100, 120), torch.rand(3, 96, 96)], "targets": [target, target]}

    return Made(model, draw, lambda out: torch.stack([*out.values()]).sum())


def video() -> Made:
    models: Any = pytest.importorskip("torchvision.models.video")
    return Made(models.r2plus1d_18(num_classes=10), lambda: {"x": torch.randn(1, 3, 4, 32, 32)}, classes)


def unet2d() -> Made:
    diffusers: Any = pytest.importorskip("diffusers")
    model = diffusers.UNet2DModel(
        sample_size=32, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"), dropout=0.1,
    )  # fmt: skip
    draw = lambda: {"sample": torch.randn(4, 3, 32, 32), "timestep": torch.randint(0, 1000, (4,))}  # noqa: E731
    return Made(model, draw, lambda out: square(out.sample))


def dit() -> Made:
    diffusers: Any = pytest.importorskip("diffusers")
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=4, num_layers=4, sample_size=16, dropout=0.1,
        num_embeds_ada_norm=50, norm_num_groups=4,
    )  # fmt: skip

    def draw() -> Arguments:
        times, kinds = torch.randint(0, 50, (4,)), torch.randint(0, 50, (4,))
        return {"hidden_states": torch.randn(4, 4, 16, 16), "timestep": times, "class_labels": kinds}

    return Made(model, draw, lambda out: square(out.sample))


class Translator(nn.Module):
    """A GRU that reads, and a cell that attends to it, in a loop of Python, with its own words fed back."""

    def __init__(self, d: int = 48, words: int = 200) -> None:
        super().__init__()
        self.embed, self.reader = nn.Embedding(words, d), nn.GRU(d, d, batch_first=True)
        self.cell, self.query, self.out = nn.GRUCell(2 * d, d), nn.Linear(d, d), nn.Linear(2 * d, words)
        self.dropout = nn.Dropout(0.1)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory, last = self.reader(self.dropout(self.embed(source)))
        h, word, loss = last[0], target[:, 0], memory.new_zeros(())
        for step in range(1, target.shape[1]):
            weights = torch.einsum("bd,bnd->bn", self.query(h), memory).softmax(-1)
            context = torch.einsum("bn,bnd->bd", self.dropout(weights), memory)
            h = self.cell(torch.cat([self.embed(word), context], -1), h)
            scores = self.out(torch.cat([h, context], -1))
            loss = loss + F.cross_entropy(scores, target[:, step])
            word = target[:, step] if step % 2 else scores.argmax(-1)
        return loss / target.shape[1]


def translator() -> Made:
    draw = lambda: {"source": tokens(32, 8, vocabulary=200), "target": tokens(32, 8, vocabulary=200)}  # noqa: E731
    return Made(Translator(), draw, lambda out: out)


class PointNet(nn.Module):
    """Points are turned by a matrix made of them, seen one by one, and pooled."""

    def __init__(self) -> None:
        super().__init__()
        self.turn, self.each = self.shared(3, 32, 64), self.shared(3, 64, 128, 128)
        self.matrix, self.head = nn.Linear(64, 9), nn.Sequential(nn.Linear(128, 64), nn.Dropout(0.3), nn.Linear(64, 10))

    @staticmethod
    def shared(*sizes: int) -> nn.Sequential:
        def layer(a: int, b: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv1d(a, b, 1), nn.BatchNorm1d(b), nn.ReLU(inplace=True))

        return nn.Sequential(*map(layer, sizes, sizes[1:]))

    def forward(self, points: Tensor) -> Tensor:
        matrix = self.matrix(self.turn(points).max(-1).values).view(-1, 3, 3) + torch.eye(3)
        return self.head(self.each(torch.bmm(matrix, points)).max(-1).values)


class GraphNet(nn.Module):
    """Layers over a sparse matrix of neighbours."""

    def __init__(self, nodes: int = 500, d: int = 64, depth: int = 5) -> None:
        super().__init__()
        edges = torch.randint(0, nodes, (2, 8 * nodes))
        matrix = torch.sparse_coo_tensor(edges, torch.full((8 * nodes,), 1 / 8), (nodes, nodes)).coalesce()
        self.register_buffer("neighbours", matrix)
        parts = (nn.Sequential(nn.Linear(2 * d, d), nn.BatchNorm1d(d), nn.ReLU()) for _ in range(depth))
        self.layers = nn.ModuleList(parts)
        self.out = nn.Linear(d, 7)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            around = torch.sparse.mm(self.neighbours, x)
            x = x + F.dropout(layer(torch.cat([x, around], -1)), 0.2, self.training)
        return self.out(x)


MODELS: dict[str, Callable[[], Made]] = {
    "gpt2": lambda: of_transformers("GPT2", "LMHeadModel", **GPT2),
    "gpt2 eager": lambda: of_transformers("GPT2", "LMHeadModel", attention="eager", **GPT2),
    "gpt-neox": lambda: decoder("GPTNeoX", hidden_dropout=0.1, attention_dropout=0.1, **SMALL),
    "opt": lambda: decoder("OPT", ffn_dim=256, word_embed_proj_dim=64, layerdrop=0.1, **SMALL),
    "llama": lambda: decoder("Llama", **GROUPED),
    "llama eager": lambda: decoder("Llama", attention="eager", **GROUPED),
    "mistral": lambda: decoder("Mistral", sliding_window=24, **GROUPED),
    "qwen3": lambda: decoder("Qwen3", **GROUPED),
    "gemma2": lambda: decoder("Gemma2", attention="eager", sliding_window=24, query_pre_attn_scalar=16, **GROUPED),
    "mixtral": lambda: decoder("Mixtral", num_local_experts=4, output_router_logits=True, **GROUPED),
    "qwen3-moe": lambda: decoder("Qwen3Moe", num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64, **GROUPED),
    "mamba": lambda: decoder("Mamba", draw=brief, vocab_size=300, hidden_size=32, num_hidden_layers=3),
    "bert": lambda: encoder("Bert"),
    "roberta": lambda: encoder("Roberta"),
    "deberta-v2": lambda: encoder(
        "DebertaV2", relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=16, conv_kernel_size=3
    ),
    "albert": lambda: encoder("Albert", embedding_size=32, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1),
    "distilbert": lambda: of_transformers(
        "DistilBert", "ForMaskedLM", vocab_size=300, dim=64, n_layers=4, n_heads=4, hidden_dim=256
    ),
    "electra": lambda: encoder("Electra", embedding_size=32),
    "t5": lambda: seq2seq(
        "T5", vocab_size=300, d_model=64, d_kv=16, d_ff=256, num_layers=2, num_heads=4, decoder_start_token_id=0
    ),
    "bart": lambda: seq2seq("Bart", encoder_layerdrop=0.1, **PAIRED),
    "whisper": whisper,
    "wav2vec2": wav2vec2,
    "vit": lambda: vision("ViT", image_size=64, patch_size=8, hidden_dropout_prob=0.1, **SMALL),
    "swin": lambda: vision("Swin", image_size=64, embed_dim=32, depths=[2, 2], num_heads=[2, 4], window_size=4),
    "convnext": lambda: vision("ConvNext", depths=[2] * 3, hidden_sizes=[32, 64, 96], num_stages=3, drop_path_rate=0.1),
    "segformer": segformer,
    "detr": detr,
    "clip": clip,
    "lora": lora,
    "efficientnet": lambda: of_timm("efficientnet_b0", drop_rate=0.1, drop_path_rate=0.1),
    "maxvit": lambda: of_timm("maxvit_rmlp_pico_rw_256", img_size=64, n=2),
    "mixer": lambda: of_timm("mixer_s32_224", size=128, img_size=128),
    "regnet": lambda: of_timm("regnety_002"),
    "nfnet": lambda: of_timm("test_nfnet", size=96),
    "resnet": lambda: of_torchvision("resnet50", n=2),
    "mobilenet": lambda: of_torchvision("mobilenet_v3_large"),
    "densenet": lambda: of_torchvision("densenet121", n=2),
    "googlenet": lambda: of_torchvision(
        "googlenet", loss=lambda outs: torch.stack([*map(classes, outs)]).sum(), aux_logits=True, init_weights=False
    ),
    "deeplab": deeplab,
    "faster r-cnn": faster_rcnn,
    "r(2+1)d": video,
    "unet2d": unet2d,
    "dit": dit,
    "translator": translator,
    "pointnet": lambda: Made(PointNet(), lambda: {"points": torch.randn(8, 3, 256)}, classes),
    "graph": lambda: Made(GraphNet(), lambda: {"x": torch.randn(500, 64)}, square),
}  # fmt: skip
ALWAYS = ("gpt2 eager", "mixtral", "convnext", "pointnet", "graph")
# The part of plain's peak that first steps take, where blocks that are dropped whole are large, or can't be dropped.
FIRST = {
    "gpt2 eager": 0.42, "opt": 0.53, "mamba": 0.59, "bart": 0.42, "whisper": 0.57, "wav2vec2": 0.82,
    "vit": 0.46, "swin": 0.47, "convnext": 0.57, "segformer": 0.58, "mixer": 0.65, "regnet": 0.55,
    "nfnet": 0.91, "resnet": 0.73, "mobilenet": 0.45, "googlenet": 0.5, "deeplab": 0.78, "faster r-cnn": 0.81,
    "r(2+1)d": 0.76, "unet2d": 0.45, "pointnet": 0.62, "graph": 0.64, "translator": 0.5,
}  # fmt: skip
# Parts of the budget that later steps take, as sizes depend on data, layers are left out; or it is not foreseen.
OVER = {"faster r-cnn": 1.002, "bart": 1.03}


def trained(made: Made, memory: Any = None) -> Training:
    """Train a copy of a model for some steps, within a budget if one is given."""
    model = copy.deepcopy(made.model).train()
    run: Any = model if memory is None else revfx.convert(model, memory=memory)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    values: list[Tensor] = []
    peaks: list[int] = []
    for step in range(STEPS):
        torch.manual_seed(100 + step)
        given = made.draw()
        optimizer.zero_grad(set_to_none=False)
        losses: list[Tensor] = []

        def forward(given: Arguments = given, losses: list[Tensor] = losses) -> Tensor:
            losses.append(made.loss(run(**given)))
            return losses[0]

        torch.manual_seed(step)
        np.random.seed(step)  # draws what some models mask
        peaks.append(measure_memory(forward, warm_up=False).peak)
        values += [losses[0].detach(), torch.rand(2)]
        values += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        values += [b.to_dense() if b.is_sparse else b.clone() for b in model.buffers()]
        optimizer.step()
    return values, peaks


def trained_within(made: Made, share: float, plain: int) -> tuple[Training, float]:
    """Train within a share of the plain model's peak, or within the least feasible one; return that too."""
    try:
        return trained(made, share), share
    except revfx.BudgetError as error:
        least = int(LEAST * error.least)
    assert share < least / plain, "a budget is refused that is no less than what is called the least"
    return trained(made, least), least / plain


@pytest.mark.filterwarnings("ignore:.*a forward ran other operators")  # BART leaves out layers
@pytest.mark.parametrize("name", deep_but(ALWAYS, MODELS))
def test_training_within_a_budget_is_plain_training(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries, as they make models
        made = MODELS[name]()
    plain, peaks = trained(made)
    most = max(peaks)
    for asked in SHARES:
        (got, peaks), share = trained_within(made, asked, most)
        assert equal(got, plain), f"{asked}: not the plain model's bits"
        first, *later = [p / most for p in peaks]
        assert max(later) <= share * OVER.get(name, 1.0), f"{asked}: later steps take {later}, of {share}"
        assert first <= max(share, FIRST.get(name, 0.0)), f"{asked}: the first step takes {first}, of {share}"
