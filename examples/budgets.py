"""Any model in less memory: what budgets cost beside checkpointing, selective checkpointing and torch's own budget.

Every cell is measured: the peak of a step above what is there before it, by the profiler, from the first step on; its
time beside plain steps, in rounds in which each way has its turn; and loss, gradients and buffers, by `torch.equal`,
with dropout on. Beside each rival stands revfx at the peak that the rival was measured to have.

    python examples/budgets.py                                    # two minutes: an encoder and an LSTM
    python examples/budgets.py --short                            # ten seconds
    python examples/budgets.py --models gpt2,resnet50 --rivals    # needs transformers, timm, torchvision
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import time
from collections.abc import Iterator
from typing import Any

import torch
from _report import require
from budget_models import MODELS, Task
from budget_rivals import Call, rivals
from torch import Tensor, nn

import revfx
from revfx.errors import BudgetError
from revfx.testing import measure_memory


SHARES = "1.0,.8,.6,.5,.4,.3,.2"
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_memory() -> None:
    """None; glibc keeps what is freed: to give it back and ask for it anew takes longer than what is compared."""
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


class Way:
    """One way to train a model: its measured peak, what a step of it gives, and how long each takes."""

    def __init__(self, name: str, task: Task, call: Call) -> None:
        self.name, self.task, self.call = name, task, call
        self.times: list[float] = []
        self.note = ""

    def loss(self) -> Tensor:
        """The loss of a forward."""
        with torch.autocast("cpu", torch.bfloat16) if self.task.half else contextlib.nullcontext():
            out = self.call(*self.task.args, **self.task.kwargs)
        return self.task.loss(out)

    def measure(self, steps: int = 3) -> None:
        """Note the peak of the first steps, and what they give."""
        model = self.task.model
        model.zero_grad(set_to_none=False)
        self.peak, self.found = 0, list[Tensor]()
        for seed in range(steps):
            torch.manual_seed(seed)
            self.peak = max(self.peak, measure_memory(self.loss).peak)
        for seed in range(steps):
            model.zero_grad(set_to_none=False)
            torch.manual_seed(seed)
            loss = self.loss()
            loss.backward()
            self.found += [loss.detach().clone(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        self.found += [b.clone() for b in model.buffers()]

    def step(self) -> None:
        """One step, timed."""
        self.task.model.zero_grad(set_to_none=False)
        start = time.perf_counter()
        self.loss().backward()
        self.times.append(time.perf_counter() - start)


def fitted(task: Task, memory: Any) -> Way:
    """revfx within a budget."""
    own = copy.deepcopy(task)
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16) if own.half else contextlib.nullcontext():
        converted: Any = revfx.convert(own.model, memory=memory, compile=own.compiled)
        converted.revfx.ready(converted, own.args, own.kwargs)
    way = Way(memory if isinstance(memory, str) else f"memory={memory:g}", own, converted)
    way.note = f"{time.perf_counter() - start:.1f}"
    return way


def ways_of(task: Task, shares: list[float], with_rivals: bool) -> Iterator[tuple[Way, float | None]]:
    """The plain model, budgets with their shares, and rivals each before revfx at its peak."""
    own = copy.deepcopy(task)  # buffers of `task` stay as they are
    plain = Way("plain", own, own.model)
    if own.compiled:
        before = copy.deepcopy(own.model.state_dict())
        revfx.convert(own.model, memory=1.0, compile=True)
        plain.loss().backward()  # compiles
        own.model.load_state_dict(before)
    plain.measure()
    yield plain, None
    least = 0
    for share in shares:
        try:
            way = fitted(task, share)
        except BudgetError as e:
            least = int(str(e).partition("budget is ")[2].partition(" ")[0])
            break
        way.measure()
        yield way, share
    if least:
        way = fitted(task, least)
        way.measure()
        way.name = "the least"
        yield way, least / plain.peak
    for name, build in [] if task.compiled else rivals(task, with_rivals):
        own = copy.deepcopy(task)
        rival = Way(name, own, build(own.model))
        try:
            rival.measure()
        except RuntimeError as e:  # torch's budget keeps BatchNorm's statistics, and writes to them
            print(f"{name} raises: {str(e)[:99]}")
            continue
        yield rival, None
        with contextlib.suppress(BudgetError):
            ours = fitted(task, min(1.0, rival.peak / plain.peak))  # of the same caller, who holds as much
            ours.measure()
            ours.name = "  revfx at that peak"
            yield ours, rival.peak / plain.peak


def without_dropout(model: nn.Module) -> None:
    """None; nothing is drawn any more."""
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
        for name in ("dropout", "attention_dropout"):
            if isinstance(getattr(m, name, None), float):
                setattr(m, name, 0.0)


def table(task: Task, name: str, shares: list[float], rounds: int, with_rivals: bool) -> None:
    """None; prints one model's table, and fails where a budget is not kept or a bit differs."""
    rows = [*ways_of(task, shares, with_rivals)]
    for _ in range(rounds + 1):
        for way, _ in rows:
            way.step()
    for way, _ in rows:
        del way.times[0]
    plain = rows[0][0]
    base = torch.tensor(plain.times)
    print(f"\n{name}: a plain step takes {base.median():.3f} s and {plain.peak / 1e6:.1f} MB")
    print(f"{'':24}{'peak':>8}{'of budget':>11}{'time':>8}{'planned in':>12}   bits")
    for way, budget in rows:
        share, spent = way.peak / plain.peak, float((torch.tensor(way.times) / base).median())
        same = len(way.found) == len(plain.found) and all(map(torch.equal, way.found, plain.found))
        of = "" if budget is None else f"{share / budget:.3f}"
        bits = "the same" if same else "others"
        print(f"{way.name:24}{share:8.3f}{of:>11}{spent:8.3f}{way.note and way.note + ' s':>12}   {bits}", flush=True)
        require(budget is None or (same and share <= budget * 1.000001), f"{name}, {way.name}")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="encoder,lstm", help=", ".join(MODELS))
    parser.add_argument("--shares", default=SHARES, help="budgets, as shares of plain's peak")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rivals", action="store_true", help="also selective checkpoints, torch's budget")
    parser.add_argument("--half", action="store_true", help="under bf16 autocast")
    parser.add_argument("--compile", action="store_true", help="the blocks of all ways; without rivals")
    parser.add_argument("--no-dropout", action="store_true", help="with it torch's own budget gives wrong gradients")
    parser.add_argument("--short", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_memory()
    names, shares, rounds = args.models.split(","), [float(s) for s in args.shares.split(",")], args.rounds
    if args.short:
        names, shares, rounds = ["encoder"], [0.6], 1
    for name in names:
        torch.manual_seed(0)
        task = MODELS[name](args.short, args.half)
        task.compiled = args.compile
        if args.no_dropout:
            without_dropout(task.model)
        label = name + " in bf16" * args.half + ", compiled" * args.compile
        table(task, label, shares, rounds, args.rivals)


if __name__ == "__main__":
    main()
