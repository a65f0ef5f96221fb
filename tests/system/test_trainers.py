"""Loops and trainers as people write them, with a budget: the losses and weights of the plain model, below its peak."""

from __future__ import annotations

import contextlib
import logging
import random
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import pytest
import torch
from fit_models import Residual, branch, equal, quick_search as quick_search
from helpers import DEEP
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

import revfx
from revfx.errors import BudgetError, BudgetWarning


pytestmark = [
    pytest.mark.filterwarnings(r"ignore:.*isinstance\(treespec, LeafSpec\):FutureWarning"),  # Lightning, of torch
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),  # Lightning, of a loader that loads nothing
    pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in v6:FutureWarning"),  # transformers
]
SHARE, STEPS, WIDTH, WORDS = 0.6, 6, 64, 64
LONGEST = 211  # of texts


@dataclass
class Way:
    """How a loop runs: with plain models, where `memory` is None, or with a budget for each.

    `peaks`: of each step, the most bytes at once, beyond what was there before. `gradients`: bytes of those of the
    models, which a step may be the first to make. `models`: all of them, as they are run.
    """

    memory: float | int | None = None
    peaks: list[int] = field(default_factory=list[int])
    gradients: int = 0
    models: list[Any] = field(default_factory=list[Any])

    def of(self, model: nn.Module) -> Any:
        """Return the model as this way runs it."""
        self.gradients += sum(p.nbytes for p in model.parameters())
        self.models.append(model if self.memory is None else revfx.convert(model, memory=self.memory))
        return self.models[-1]

    @contextlib.contextmanager
    def step(self) -> Generator[None]:
        """Open a context whose peak counts."""
        prof: Any = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        try:
            with prof:
                yield
        finally:
            events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
            changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
            self.peaks.append(max(accumulate(changes), default=0))


Loop = Callable[[Way], list[Tensor]]  # gives losses


def assert_alike(loop: Loop, memory: float = SHARE, bound: float = SHARE, is_bytes: bool = False) -> Way:
    """Raise unless a loop gives what it gives plainly, and no step takes more than a part (`bound`) of the plain peak.

    `memory`: the budget, as a share of that peak; `is_bytes`: it is given in bytes.
    """
    plain = Way()
    want = loop(plain)
    most = max(plain.peaks)
    ours = Way(int(memory * most) if is_bytes else memory)
    assert equal(loop(ours), want) and equal(weights(ours), weights(plain))
    assert len(ours.peaks) == len(plain.peaks) >= STEPS
    assert max(ours.peaks) <= bound * most + ours.gradients, [round(p / most, 3) for p in ours.peaks]
    return ours


def weights(way: Way) -> list[Tensor]:
    return [t for model in way.models for t in model.state_dict().values()]


def layers() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(Residual(*(branch(WIDTH) for _ in range(6))), nn.Linear(WIDTH, WIDTH))


def batch(step: int) -> Tensor:
    return torch.randn(256, WIDTH, generator=torch.Generator().manual_seed(step))


def loader(rows: int, **options: Any) -> DataLoader[Any]:
    """Return batches of 256 rows, of which the last one has less."""
    return DataLoader([*torch.cat([batch(k) for k in range(4)])[:rows]], 256, **options)  # type: ignore[arg-type]


def text(rows: int, length: int, seed: int) -> Tensor:
    return torch.randint(1, WORDS, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Accelerate, and what is built on it, sets its precision once per process."""
    yield
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)  # pyright: ignore[reportPrivateUsage]


# --- transformers.Trainer
def gpt2() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"n_layer": 3, "n_head": 2, "n_embd": 32, "vocab_size": WORDS, "n_positions": LONGEST}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def by_transformers(way: Way, folder: Path, resume: bool = False, **options: Any) -> list[Tensor]:
    """Train for two epochs, whose last batches are smaller, with evaluation in between."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class Trainer(transformers.Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            with way.step():
                return super().training_step(*args, **kwargs)

    data = [{"input_ids": t, "labels": t} for t in text(44, 64, 3)]
    args = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=8, num_train_epochs=2, logging_steps=1, save_steps=3, eval_steps=2,
        eval_strategy="steps", learning_rate=1e-3, use_cpu=True, report_to=[], disable_tqdm=True,
        dataloader_pin_memory=False, **options,
    )  # fmt: skip
    trainer = Trainer(model=way.of(gpt2()), args=args, train_dataset=data, eval_dataset=data[:6])
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3") if resume else None)
    told = [entry[k] for entry in trainer.state.log_history for k in ("loss", "eval_loss") if k in entry]
    return [torch.tensor(told)]


@pytest.mark.parametrize("options", [{}, pytest.param({"bf16": True}, marks=pytest.mark.deep)], ids=["fp32", "bf16"])
def test_transformers_trainer_accumulates_evaluates_and_resumes(tmp_path: Path, options: dict[str, Any]) -> None:
    def loop(way: Way) -> list[Tensor]:
        folder = tmp_path / str(way.memory)
        found, again = by_transformers(way, folder, gradient_accumulation_steps=2, **options), Way(way.memory)
        resumed = by_transformers(again, folder, True, gradient_accumulation_steps=2, **options)
        assert equal(resumed, found) and equal(weights(again), weights(way)) and len(again.peaks) < len(way.peaks)
        return found

    assert len(assert_alike(loop).models[0].revfx.plans) == 1


@pytest.mark.parametrize("reentrant", [False, pytest.param(True, marks=pytest.mark.deep)])
def test_gradient_checkpointing_may_be_left_on(tmp_path: Path, reentrant: bool) -> None:
    """A budget in bytes that it stays within is kept; a share is of the checkpointed step."""

    def loop(way: Way) -> list[Tensor]:
        options: dict[str, Any] = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
        return by_transformers(way, tmp_path / str(way.memory), gradient_checkpointing=True, **options)

    assert_alike(loop, 1.1, 1.1, is_bytes=True)
    with pytest.raises(BudgetError, match="The model checkpoints itself"):
        loop(Way(SHARE))


# --- Lightning and Accelerate
def test_lightning_clips_and_validates(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")

    class Lit(lightning.LightningModule):
        def __init__(self, way: Way) -> None:
            super().__init__()
            self.net, self.told, self.way, self.meter = way.of(layers()), list[Tensor](), way, contextlib.ExitStack()

        def training_step(self, x: Tensor, index: int) -> Tensor:
            self.told.append(F.mse_loss(self.net(x), x))
            return self.told[-1]

        def validation_step(self, x: Tensor, index: int) -> None:
            self.training_step(x, index)

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    class Meter(lightning.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
            module.meter.enter_context(module.way.step())

        def on_before_optimizer_step(self, trainer: Any, module: Any, *_: Any) -> None:
            module.meter.close()

    def loop(way: Way) -> list[Tensor]:
        lightning.seed_everything(0, verbose=False)
        module = Lit(way)
        trainer = lightning.Trainer(
            max_epochs=2, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, callbacks=[Meter()],
            enable_model_summary=False, enable_checkpointing=False, gradient_clip_val=0.5, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(module, loader(1000, shuffle=True), loader(300))
        return [t.detach() for t in module.told]

    assert_alike(loop)


def test_accelerate_accumulates_under_autocast() -> None:
    accelerate = pytest.importorskip("accelerate")

    def loop(way: Way) -> list[Tensor]:
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
        given, found = way.of(layers()), list[Tensor]()
        model, optimizer, batches = accelerator.prepare(given, torch.optim.AdamW(given.parameters()), loader(1000))
        for x in chain(batches, batches):
            with accelerator.accumulate(model):
                with way.step():
                    loss = F.mse_loss(model(x), x)
                    accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            found.append(loss.detach())
        return found

    assert_alike(loop)


# --- loops by hand
def read(way: Way, batches: Iterable[tuple[Tensor, Tensor | None]]) -> list[Tensor]:
    """Train GPT-2 with words, and masks of these; return the losses."""
    model, found = way.of(gpt2()), list[Tensor]()
    for words, mask in batches:
        model.zero_grad()
        with way.step():
            loss = model(input_ids=words, attention_mask=mask, labels=words).loss
            loss.backward()
        torch.optim.SGD(model.parameters(), 0.05).step()
        found.append(loss.detach())
    return found


def train(way: Way, model: Any, steps: Iterable[int], give: Callable[[int], Tensor] = batch) -> list[Tensor]:
    """Take some steps of SGD; return their losses."""
    found: list[Tensor] = []
    for step in steps:
        model.zero_grad()
        with way.step():
            loss = model(give(step)).square().mean()
            loss.backward()
        torch.optim.SGD(model.parameters(), 0.05).step()
        found.append(loss.detach())
    return found


def lbfgs(way: Way) -> list[Tensor]:
    model, found, x = way.of(layers()), list[Tensor](), batch(0)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=8)

    def closure() -> Tensor:
        torch.manual_seed(0)
        optimizer.zero_grad()
        with way.step():
            loss = F.mse_loss(model(x), x.roll(1, 1))
            loss.backward()
        found.append(loss.detach())
        return found[-1]

    optimizer.step(closure)
    return found


def one_buffer(way: Way) -> list[Tensor]:
    """Write each batch to the memory of the one before."""
    buffer = torch.empty(256, WIDTH)
    return train(way, way.of(layers()), range(STEPS), lambda step: buffer.copy_(batch(step)))


def evaluated(way: Way) -> list[Tensor]:
    """Evaluate, and keep what comes of it; a plain model takes the weights, and gives its own back."""
    model, other, found = way.of(layers()), layers().eval(), list[Tensor]()
    for epoch in range(3):
        found += train(way, model, range(2 * epoch, 2 * epoch + 2))
        other.load_state_dict(model.eval().state_dict())
        with torch.no_grad():
            found += [m(batch(100 + k)) for k in range(3) for m in (model, other)]
        assert equal(found[-6::2], found[-5::2])
        model.train().load_state_dict({k: t * 0.99 for k, t in other.state_dict().items()})
    return found


def cast(way: Way) -> list[Tensor]:
    """Cast the model between steps."""
    model, found = way.of(layers()), list[Tensor]()
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float32):
        model.to(dtype)
        found += train(way, model, range(3), lambda step, dtype=dtype: batch(step).to(dtype))
    return found


def adapted(way: Way, first: bool) -> list[Tensor]:
    """Add low-rank adapters of peft before the conversion (`first`), or after it."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=r".*\.layers\.\d\.(1|4)", r=4, lora_dropout=0.1)
    if first:
        return train(way, way.of(peft.get_peft_model(layers(), config)), range(STEPS))
    return train(way, peft.get_peft_model(way.of(layers()), config), range(STEPS))


def interrupted(way: Way, at: int, is_backward: bool) -> list[Tensor]:
    """Interrupt a step in the midst of the forward, or of the backward, and go on."""
    model = way.of(layers())

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    found = train(way, model, range(at))
    layer: Any = model.get_submodule("0.layers.3")
    handle = layer[1].weight.register_hook(stop) if is_backward else layer.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        train(way, model, [at])
    handle.remove()
    found += [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return [*found, *train(way, model, range(at, STEPS))]


LOOPS: dict[str, Loop] = {
    "L-BFGS": lbfgs, "one buffer": one_buffer, "evaluation": evaluated, "casts": cast,
    "adapters, then converted": lambda way: adapted(way, True),
    "converted, then adapters": lambda way: adapted(way, False),
    "interrupted in the first forward": lambda way: interrupted(way, 0, False),
    "interrupted in the first backward": lambda way: interrupted(way, 0, True),
    "interrupted in a later forward": lambda way: interrupted(way, 3, False),
    "interrupted in a later backward": lambda way: interrupted(way, 3, True),
}  # fmt: skip


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_trains_as_plainly(name: str) -> None:
    assert_alike(LOOPS[name])


# --- steps that differ
def thawed(way: Way) -> list[Tensor]:
    """Train the upper half first."""
    model, found = way.of(layers()), list[Tensor]()
    for step in range(STEPS):
        model.get_submodule("0.layers")[:3].requires_grad_(step >= 3)
        found += train(way, model, [step])
    return found


def left_out(way: Way, at: int) -> list[Tensor]:
    """Run a step without its backward; its loss is there until the next one is."""
    model = way.of(layers())
    found = train(way, model, range(at))
    loss = model(batch(at)).square().mean()
    return [*found, *train(way, model, range(at, STEPS)), loss.detach()]


def padded(way: Way) -> list[Tensor]:
    """Every other batch is padded: transformers leaves out the mask of those that are not."""
    masks = [(torch.arange(64).expand(8, 64) < length).long() for length in (64, 50)]
    return read(way, [(text(8, 64, step), masks[step % 2]) for step in range(2 * STEPS)])


VARYING: dict[str, tuple[Loop, bool]] = {  # loops, and whether the budget is in bytes
    "thawed": (thawed, False),
    "a first forward without a backward": (lambda way: left_out(way, 0), True),
    "a later forward without a backward": (lambda way: left_out(way, 3), True),
}


@pytest.mark.parametrize("name", VARYING)
def test_steps_that_differ(name: str) -> None:
    loop, is_bytes = VARYING[name]
    assert_alike(loop, 0.5, 0.5, is_bytes)


def test_batches_with_and_without_padding() -> None:
    """The first batch of the other kind drops its activations block by block, but for the first blocks, and warns."""
    with pytest.warns(BudgetWarning, match="other operators"):
        ours = assert_alike(padded, 0.5, 1.0)
    plain = Way()
    padded(plain)
    assert ours.peaks.index(max(ours.peaks)) == 1
    assert max(ours.peaks[2:]) <= 0.5 * max(plain.peaks) + ours.gradients


# --- texts of many lengths
def test_lengths_in_random_order(caplog: pytest.LogCaptureFixture) -> None:
    """200 different lengths; last batches are smaller."""
    caplog.set_level(logging.INFO, "revfx")
    steps, draw = 1000 if DEEP else 40, random.Random(1)
    lengths = [LONGEST - draw.randrange(200) for _ in range(steps - 1)] + [LONGEST]
    texts = [text(5 if step % 25 == 24 else 8, length, step) for step, length in enumerate(lengths)]
    (model,) = assert_alike(lambda way: read(way, [(t, None) for t in texts])).models
    told = [record for record in caplog.records if record.name == "revfx"]
    assert len(told) == len(model.revfx.plans) <= 8
