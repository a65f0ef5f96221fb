"""The trainers that people use, unchanged: the same training plain and converted from one seed.

Losses and weights agree, a checkpoint of the converted model is one of the plain model, and memory is what revfx frees.
"""

from __future__ import annotations

import copy
import functools
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import deep_but, kept_cuts
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import revfx
from revfx.converted import Reversible
from revfx.errors import RevfxWarning
from revfx.testing import measure_memory


pytestmark = [
    pytest.mark.usefixtures("fp64", "fresh"),
    pytest.mark.filterwarnings(r"ignore:.*isinstance\(treespec, LeafSpec\):FutureWarning"),  # Lightning, of torch
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),  # Lightning, of a loader that loads nothing
]
WORDS, LENGTH, BATCH, STEPS = 17, 16, 8, 6
CUTS = 6  # at most: those of the embedding, of the first layer, which nothing before inverts to, and of the head
Weights = dict[str, Tensor]


# --- a reversible language model in plain PyTorch, and two that are made of it
class Attention(nn.Module):
    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.out = nn.LayerNorm(d), nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.dropout(self.out(y.transpose(1, 2).reshape(b, t, d)))


class LanguageModel(nn.Module):
    """Loss and logits, as a dict: `x1 = x1 + attention(x2)`, `x2 = x2 + mlp(x1)`."""

    def __init__(self, d: int = 32, layers: int = 6) -> None:
        super().__init__()
        mlp = lambda: nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))  # noqa: E731
        self.embed = nn.Embedding(WORDS, d)
        self.f = nn.ModuleList(Attention(d, 4) for _ in range(layers))
        self.g = nn.ModuleList(mlp() for _ in range(layers))
        self.head = nn.Linear(2 * d, WORDS)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        x1 = x2 = self.embed(input_ids)
        for f, g in zip(self.f, self.g, strict=True):
            x1 = x1 + f(x2)
            x2 = x2 + g(x1)
        logits = self.head(torch.cat([x1, x2], -1))
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.CrossEntropyLoss()(logits.flatten(0, 1), labels.flatten()), "logits": logits}


@functools.cache
def pretrained() -> Any:
    """The same as a class of the transformers library, which returns one of its outputs and writes its config."""
    transformers = pytest.importorskip("transformers")

    class Config(transformers.PretrainedConfig):
        model_type = "reversible"

    class Pretrained(transformers.PreTrainedModel):
        config_class = Config

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.core = LanguageModel()
            self.post_init()

        def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
            return transformers.modeling_outputs.CausalLMOutput(**self.core(input_ids, labels))

    return lambda: Pretrained(Config())


@functools.cache
def lightning_module() -> Any:
    """The same inside a LightningModule that converts its network itself, or whose step calls the whole."""
    lightning = pytest.importorskip("lightning")

    class Lit(lightning.LightningModule):
        def __init__(self, convert_at: str = "", calls: str = "net") -> None:
            super().__init__()
            self.save_hyperparameters()
            net = LanguageModel()
            self.net = revfx.convert(net) if convert_at == "__init__" else net
            self.losses: list[float] = []

        def configure_model(self) -> None:
            if self.hparams["convert_at"] == "configure_model":
                self.net = revfx.convert(self.net)

        def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
            return self.net(input_ids, labels)

        def training_step(self, batch: Any, index: int) -> Tensor:
            loss = (self if self.hparams["calls"] == "self" else self.net)(**batch)["loss"]
            self.log("loss", loss)
            self.losses.append(loss.item())
            return loss

        def validation_step(self, batch: Any, index: int) -> None:
            self.log("validation", self(**batch)["loss"])

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    return Lit


# --- what they are trained on, and what is compared
def data() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    text = torch.randint(WORDS, (32, LENGTH + 1), generator=generator)
    return [{"input_ids": t[:-1], "labels": t[1:]} for t in text]


def loader() -> DataLoader[Any]:
    return DataLoader(data(), BATCH, shuffle=True)  # type: ignore[arg-type]


@pytest.fixture
def fresh() -> Iterator[None]:
    """Accelerate, and what is built on it, sets its precision once per process."""
    yield
    try:
        from accelerate.state import AcceleratorState
    except ImportError:
        return
    AcceleratorState._reset_state(reset_partial_state=True)  # pyright: ignore[reportPrivateUsage]


@dataclass(frozen=True)
class Trained:
    """The loss of every step and the weights at the end."""

    losses: list[float]
    weights: Weights

    @staticmethod
    def of(losses: list[float], model: nn.Module) -> Trained:
        """A copy of them."""
        return Trained(losses, {k: t.detach().clone() for k, t in model.state_dict().items()})

    def assert_like(self, other: Trained) -> None:
        """Raise unless losses and weights are the same, bit for bit."""
        assert len(self.losses) == len(other.losses) >= STEPS
        assert self.losses == other.losses and self.losses[-1] != self.losses[0]
        assert_same_weights(self.weights, other.weights)


def assert_same_weights(got: Weights, want: Weights) -> None:
    assert list(got) == list(want) and all(torch.equal(got[k], want[k]) for k in want)


def assert_saves(converted: Any, call: Callable[[nn.Module], Tensor], plain: nn.Module) -> None:
    """Raise unless one plan has a region, and a forward keeps much less than the plain model's."""
    assert len(converted.revfx.plans) == 1 and converted.revfx.plans[0].regions
    assert kept_cuts(converted) <= CUTS
    kept = [measure_memory(lambda m=m: call(m)).kept for m in (plain.train(), converted.train())]
    assert kept[1] < 0.35 * kept[0]


def loss_of(model: nn.Module) -> Tensor:
    batch = next(iter(DataLoader(data(), BATCH)))  # type: ignore[arg-type]
    return model(**batch)["loss"]


def twins(make: Callable[[], nn.Module]) -> tuple[nn.Module, Any]:
    """A model, and the same converted, with weights of their own."""
    torch.manual_seed(0)
    plain = make()
    return plain, revfx.convert(copy.deepcopy(plain))


# --- transformers.Trainer
def train_by_transformers(model: nn.Module, folder: Path, resume: bool = False, **options: Any) -> Trained:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    args = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=BATCH, max_steps=STEPS, logging_steps=1, save_steps=STEPS // 2,
        learning_rate=1e-3, use_cpu=True, report_to=[], disable_tqdm=True, dataloader_pin_memory=False, **options,
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=args, train_dataset=data(), eval_dataset=data())
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{STEPS // 2}") if resume else None)
    assert trainer.evaluate()["eval_loss"] > 0
    return Trained.of([entry["loss"] for entry in trainer.state.log_history if "loss" in entry], model)


@pytest.mark.parametrize("options", [{"gradient_accumulation_steps": 2}, pytest.param({}, marks=pytest.mark.deep)])
def test_transformers_trainer_takes_a_converted_model(tmp_path: Path, options: dict[str, Any]) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    plain, converted = twins(LanguageModel)
    expected = train_by_transformers(plain, tmp_path / "plain", **options)
    got = train_by_transformers(converted, tmp_path / "revfx", **options)
    got.assert_like(expected)
    assert_saves(converted, loss_of, plain)

    fresh, again = LanguageModel(), twins(LanguageModel)[1]
    fresh.load_state_dict(safetensors.load_file(tmp_path / "revfx" / f"checkpoint-{STEPS}" / "model.safetensors"))
    assert_same_weights(fresh.state_dict(), got.weights)
    resumed = train_by_transformers(again, tmp_path / "revfx", resume=True, **options)
    assert_same_weights(resumed.weights, got.weights)


@pytest.mark.deep
def test_transformers_trainer_in_bfloat16(tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    plain, converted = twins(LanguageModel)
    expected = train_by_transformers(plain, tmp_path / "plain", bf16=True)
    train_by_transformers(converted, tmp_path / "revfx", bf16=True).assert_like(expected)
    assert 0 < kept_cuts(converted) <= CUTS


def test_pretrained_model_writes_the_checkpoint_of_its_own_class(tmp_path: Path) -> None:
    make = pretrained()
    plain, converted = twins(make)
    expected = train_by_transformers(plain, tmp_path / "plain")
    got = train_by_transformers(converted, tmp_path / "revfx")
    got.assert_like(expected)
    assert_saves(converted, loss_of, plain)

    folders = [tmp_path / way / f"checkpoint-{STEPS}" for way in ("plain", "revfx")]
    configs = [json.loads((folder / "config.json").read_text()) for folder in folders]
    assert configs[0] == configs[1] and configs[1]["architectures"] == ["Pretrained"]
    assert_same_weights(type(plain).from_pretrained(folders[1]).state_dict(), got.weights)  # type: ignore[attr-defined]


# --- models of the transformers library that are not reversible, or are in a way of their own
def gpt2(transformers: Any) -> nn.Module:
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": WORDS, "n_positions": 32}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def bert(transformers: Any) -> nn.Module:
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
    config = transformers.BertConfig(**sizes, vocab_size=WORDS, max_position_embeddings=32)
    return transformers.BertForMaskedLM(config)


@pytest.mark.deep
@pytest.mark.parametrize("make", [gpt2, bert])
def test_residual_transformer_is_trained_as_before_and_the_reason_is_said(
    make: Callable[..., nn.Module], tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    plain, converted = twins(lambda: make(transformers))
    expected = train_by_transformers(plain, tmp_path / "plain")
    with pytest.warns(RevfxWarning, match="nothing reversible was found") as caught:
        got = train_by_transformers(converted, tmp_path / "revfx")
    assert len(caught) == 1
    got.assert_like(expected)
    assert any("is added to something computed from itself" in r.detail for r in converted.revfx.refusals)


def test_model_that_makes_a_cache_and_the_reformer_give_what_they_gave() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "attention_head_size": 8, "num_attention_heads": 2, "feed_forward_size": 32}
    config = transformers.ReformerConfig(
        **sizes, vocab_size=WORDS, attn_layers=["local"] * 2, local_attn_chunk_length=8, axial_pos_embds=False,
        is_decoder=True, max_position_embeddings=32, hidden_dropout_prob=0.0, local_attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    ids = torch.randint(WORDS, (2, LENGTH))

    def trained(model: Any) -> tuple[Any, list[Tensor | None]]:
        torch.manual_seed(1)
        model.zero_grad()
        outputs = model(input_ids=ids, labels=ids)
        outputs.loss.backward()  # not `autograd.grad`, which the Reformer's own reversible Function does not support
        return outputs, [None if p.grad is None else p.grad.clone() for p in model.parameters()]

    reformer = transformers.ReformerModelWithLMHead(config)
    for model, is_warned_of in (gpt2(transformers), True), (reformer, False):
        outputs, expected = trained(model.train())
        converted = revfx.convert(model)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for _ in range(3):
                again, got = trained(converted)
                assert type(again) is type(outputs) and list(again) == list(outputs) and again.loss == outputs.loss
                for g, w in zip(got, expected, strict=True):
                    assert g is w if g is None or w is None else torch.equal(g, w)
        assert any("nothing reversible was found" in str(w.message) for w in said) or not is_warned_of


# --- Lightning
def train_by_lightning(module: Any, folder: Path, **options: Any) -> Trained:
    lightning = pytest.importorskip("lightning")
    lightning.seed_everything(0, verbose=False)
    trainer = lightning.Trainer(
        max_steps=STEPS, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, log_every_n_steps=1, **options,
    )  # fmt: skip
    trainer.fit(module, loader(), DataLoader(data(), BATCH))  # type: ignore[arg-type]
    trainer.save_checkpoint(folder, weights_only=False)
    return Trained.of(module.losses, module)


def converted_in(where: str) -> Any:
    """A module that is converted as a whole, or that converts its network in one of its methods."""
    torch.manual_seed(0)
    make = lightning_module()
    return revfx.convert(make(calls="self")) if where == "whole" else make(convert_at=where)


@pytest.mark.parametrize(
    ("where", "options"),
    [
        ("__init__", {}),
        ("configure_model", {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}),
        ("whole", {}),
        ("configure_model", {"precision": "bf16-mixed"}),
    ],
    ids=["init", "configure_model", "whole", "bf16"],
)
def test_lightning_trains_a_converted_network(where: str, options: dict[str, Any], tmp_path: Path) -> None:
    if "precision" in options:
        torch.set_default_dtype(torch.float32)
    plain = converted_in("")
    expected = train_by_lightning(plain, tmp_path / "plain.ckpt", **options)
    module = converted_in(where)
    got = train_by_lightning(module, tmp_path / "revfx.ckpt", **options)
    got.assert_like(expected)
    if not options:
        assert_saves(module if where == "whole" else module.net, loss_of, plain.net)
    fresh = lightning_module().load_from_checkpoint(tmp_path / "revfx.ckpt", weights_only=False, convert_at="")
    assert not isinstance(fresh.net, Reversible)
    assert_same_weights(fresh.state_dict(), got.weights)


def test_a_lightning_step_that_calls_a_part_is_watched_when_the_whole_is_converted(tmp_path: Path) -> None:
    """`training_step` calls `self.net` past the forward of the module; methods are watched like it."""
    plain = converted_in("")
    expected = train_by_lightning(plain, tmp_path / "plain.ckpt")
    torch.manual_seed(0)
    whole: Any = revfx.convert(lightning_module()(calls="net"))
    train_by_lightning(whole, tmp_path / "x.ckpt").assert_like(expected)
    assert whole.revfx.regions


# --- Accelerate
def train_by_accelerate(model: nn.Module, folder: Path, precision: str, every: int) -> Trained:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=every)
    net, optimizer, batches = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), loader())
    torch.manual_seed(0)
    losses: list[float] = []
    for _ in range(2):
        for batch in batches:
            with accelerator.accumulate(net):
                loss = net(**batch)["loss"]
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(net.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
    assert accelerator.unwrap_model(net) is model
    accelerator.save_model(net, str(folder))
    accelerator.save_state(str(folder / "state"))
    accelerator.load_state(str(folder / "state"))
    return Trained.of(losses, model)


@pytest.mark.parametrize(
    ("precision", "every"), deep_but((("bf16", 2),), [("no", 1), ("no", 2), ("bf16", 1), ("bf16", 2)])
)
def test_accelerate_prepares_a_converted_model(precision: str, every: int, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    if precision == "bf16":
        torch.set_default_dtype(torch.float32)
    plain, converted = twins(LanguageModel)
    expected = train_by_accelerate(plain, tmp_path / "plain", precision, every)
    got = train_by_accelerate(converted, tmp_path / "revfx", precision, every)
    got.assert_like(expected)
    assert_saves(converted, loss_of, plain)
    fresh = LanguageModel()
    fresh.load_state_dict(safetensors.load_file(tmp_path / "revfx" / "model.safetensors"))
    assert_same_weights(fresh.state_dict(), got.weights)
