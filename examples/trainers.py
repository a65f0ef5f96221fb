"""The same model trained by Hugging Face's Trainer, by Lightning and by Accelerate, plain and converted.

All that changes is one word: `Trainer(model=revfx.convert(model))`, `self.net = revfx.convert(net)`,
`accelerator.prepare(revfx.convert(model), ...)`. Losses stay the same, checkpoints are the plain model's, and the
activations are not kept. The model is the reversible transformer of `rev_transformer.py`.

    python examples/trainers.py            # a minute and a half
    python examples/trainers.py --short    # twenty seconds
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import torch
from _report import mb, require
from accelerate import Accelerator
from rev_transformer import Transformer, batches_of, corpus
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

import revfx
from revfx.testing import measure_memory


BATCH, LEARNING_RATE = 8, 3e-3
Batches = DataLoader[dict[str, Tensor]]


class LanguageModel(nn.Module):
    """Loss and logits of the next character, as a dict."""

    def __init__(self, characters: int, context: int) -> None:
        super().__init__()
        self.transformer = Transformer(characters, context)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """`loss`, and `logits` (B, T, characters)."""
        logits = self.transformer(input_ids)
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


class Lit(lightning.LightningModule):
    """The model for Lightning; what `training_step` calls is what is converted."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.losses: list[float] = []

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        """The loss."""
        loss = self.net(**batch)["loss"]
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.AdamW(self.parameters(), LEARNING_RATE)


# --- each trains `model`, writes a checkpoint, and returns the loss of every step and the weights of the checkpoint
Trained = tuple[list[float], dict[str, Tensor]]


def by_transformers(model: nn.Module, batches: Batches, folder: Path) -> Trained:
    """By `transformers.Trainer`."""
    args = TrainingArguments(
        str(folder), num_train_epochs=1, per_device_train_batch_size=BATCH, learning_rate=LEARNING_RATE, use_cpu=True,
        logging_steps=1, save_strategy="epoch", report_to=[], disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(model=model, args=args, train_dataset=batches.dataset)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints every loss
        trainer.train()
    (checkpoint,) = folder.glob("checkpoint-*")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, load_file(checkpoint / "model.safetensors")


def by_lightning(model: nn.Module, batches: Batches, folder: Path) -> Trained:
    """By `lightning.Trainer`."""
    module = Lit(model)
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, batches)
    trainer.save_checkpoint(folder / "last.ckpt", weights_only=True)
    saved = torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]
    return module.losses, {name.removeprefix("net."): t for name, t in saved.items()}


def by_accelerate(model: nn.Module, batches: Batches, folder: Path) -> Trained:
    """By a loop of one's own, with `accelerate.Accelerator`."""
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE)
    net, optimizer, loader = accelerator.prepare(model, optimizer, batches)
    losses: list[float] = []
    for batch in loader:
        loss = net(**batch)["loss"]
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    accelerator.save_model(net, str(folder))
    return losses, load_file(folder / "model.safetensors")


def main() -> None:
    """Train the model six times, and print the losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--short", action="store_true", help="12 steps each")
    args = parser.parse_args()
    torch.set_num_threads(1)  # so that losses can be repeated
    warnings.simplefilter("ignore", FutureWarning)
    warnings.filterwarnings("ignore", ".*does not have many workers")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    steps, context = (12, 32) if args.short else (100, 64)

    text = corpus()
    characters = "".join(sorted(set(text)))
    draw = batches_of(torch.tensor([characters.index(c) for c in text]), context, steps * BATCH)
    x, y = draw(torch.Generator().manual_seed(1))
    samples = [{"input_ids": a, "labels": b} for a, b in zip(x, y, strict=True)]
    batches = DataLoader(samples, BATCH)  # type: ignore[arg-type]
    first = next(iter(batches))

    def trained(train: Callable[..., Trained], prepare: Callable[[nn.Module], Any]) -> tuple[Trained, int, Any]:
        """What it gave, the bytes kept after a forward, and the model."""
        torch.manual_seed(0)
        model = prepare(LanguageModel(len(characters), context))
        with tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(1)
            gave = train(model, batches, Path(folder))
        return gave, measure_memory(lambda: model.train()(**first)["loss"]).kept, model

    print(f"{'':16}{'first loss':>11}{'last loss':>11}{'revfx':>11}{'apart by':>10}{'kept plain':>13}{'revfx':>10}")
    for train in (by_transformers, by_lightning, by_accelerate):
        name = train.__name__.removeprefix("by_")
        (want, _), kept_plain, _ = trained(train, lambda model: model)
        (got, weights), kept, model = trained(train, revfx.convert)
        apart = max(abs(a - b) for a, b in zip(got, want, strict=True))
        losses = f"{want[0]:11.6f}{want[-1]:11.6f}{got[-1]:11.6f}{apart:10.1e}"
        print(f"{name:16}{losses}{mb(kept_plain):>13}{mb(kept):>10}")

        plain = LanguageModel(len(characters), context)
        plain.load_state_dict(weights)
        same = all(torch.equal(t, weights[k]) for k, t in model.state_dict().items())
        require(len(got) == steps and got[-1] < got[0], f"{name}: the model learns")
        require(apart == 0, f"{name}: the losses are plain training's, bit for bit")
        require(same, f"{name}: the checkpoint is one of the plain model")
        require(len(model.revfx.plans) == 1 and model.revfx.regions, f"{name}: a region was found, once")
        require(kept < 0.5 * kept_plain, f"{name}: less than half is kept after the forward")


if __name__ == "__main__":
    main()
