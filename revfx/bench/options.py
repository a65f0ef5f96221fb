"""What `revfx bench` is asked for: its arguments, checked."""

from __future__ import annotations

import argparse
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from revfx.bench.fit import data_bytes
from revfx.bench.models import MODELS
from revfx.bench.ways import WAYS
from revfx.errors import WrongArguments
from revfx.report.figures import figure


UNITS: Mapping[str, int] = {"b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}
ROUNDS, QUICK_ROUNDS, QUICK_DEPTH, QUICK_BATCH = 9, 2, 4, 2  # the last divides the batch
SWEPT: Mapping[str, tuple[int, ...]] = {"depth": (4, 8, 16, 32), "batch": (1, 2, 4, 8)}  # the latter: of a quarter


def option(default: Any, text: str, metavar: str | None = None, **given: Any) -> Any:
    """Return the field of an option: its default, and what `argparse` is given."""
    return field(default=default, metadata={"help": text, **({"metavar": metavar} if metavar else {}), **given})


@dataclass(frozen=True)
class Options:
    """The arguments of `revfx bench`, and after a look at them their values; None and empty stand for the defaults."""

    models: tuple[str, ...] = option(tuple(MODELS), f"of {', '.join(MODELS)} (default: all)", "NAME", nargs="+")
    ways: tuple[str, ...] = option(
        tuple(WAYS), f"of {', '.join(WAYS)} (default: all; plain is always among them)", "NAME", nargs="+"
    )
    depth: int | None = option(None, "blocks of each model (default: each model's own)", "N", type=int)
    batch: int | None = option(None, "samples (default: each model's own)", "N", type=int)
    rounds: int = option(ROUNDS, f"steps of each way, taken in turn (default: {ROUNDS})", "N", type=int)
    sweep: str | None = option(None, "depth or batch: memory at several of them, instead of times", "WHAT")
    at: tuple[int, ...] = option((), "the depths or batches of the sweep", "N", nargs="+", type=int)
    memory: int | None = option(
        None, "the largest depth and batch that train in so much, such as 512MiB or 2GiB", "SIZE"
    )
    seconds: float = option(30.0, "for each search of --memory (default: 30)", "S", type=float)
    quick: bool = option(False, "small models, two rounds, nothing that compiles: half a minute", action="store_true")
    threads: int | None = option(None, "of torch (default: as it is)", "N", type=int)
    device: str = option("cpu", "cpu (default) or cuda", "NAME")
    csv: str | None = option(None, "also write the figures there", "PATH")
    json: str | None = option(
        None, "also write all there; without a path, to stdout and alone", "PATH", nargs="?", const="-"
    )
    plot: str | None = option(None, "also draw them there (svg, png, pdf; needs matplotlib)", "PATH")
    markdown: bool = option(False, "print Markdown", action="store_true")

    def sizes(self, model: str) -> tuple[int, int]:
        """Return the depth and the batch for a model."""
        bench = MODELS[model]
        depth, batch = (QUICK_DEPTH, max(2, bench.batch // QUICK_BATCH)) if self.quick else (bench.depth, bench.batch)
        return self.depth or depth, self.batch or batch

    def swept(self, model: str) -> tuple[int, ...]:
        """Return the depths or batches of a sweep."""
        if self.sweep is None or self.at:
            return self.at
        _, batch = self.sizes(model)
        unit = 1 if self.sweep == "depth" else max(1, batch // 4)
        return tuple(unit * n for n in SWEPT[self.sweep][: 2 if self.quick else None])


ARGUMENTS: Mapping[str, Mapping[str, Any]] = {f.name: f.metadata for f in fields(Options)}
WRITTEN = ("csv", "json", "plot", "markdown")  # where and how figures are written, which says nothing of them


def options_of(args: argparse.Namespace) -> Options:
    """Check the arguments; compiled ways are left out of quick runs, sweeps and searches unless they are named."""
    given = {name: value for name in ARGUMENTS if (value := getattr(args, name)) is not None}
    for name, known in (("models", MODELS), ("ways", WAYS)):
        if name in given:
            given[name] = _known(name, given[name], known)
    if "memory" in given:
        given["memory"] = parse_size(given["memory"])
    o = replace(_defaults(given), **given)
    o = replace(o, ways=tuple(n for n in WAYS if n == "plain" or n in o.ways), at=tuple(o.at))
    kind = o.device.split(":")[0]
    for wrong, says in (
        *((value <= 0, f"`--{name} {value}`: it must be positive.")
          for name in ("depth", "batch", "rounds", "seconds", "threads") if (value := getattr(o, name)) is not None),
        (any(n <= 0 for n in o.at), f"`--at {' '.join(map(str, o.at))}`: they must be positive."),
        (o.sweep not in (None, *SWEPT), f"`--sweep {o.sweep}` is not known; use {' or '.join(SWEPT)}."),
        (o.at and not o.sweep, "`--at` says where a sweep looks; give `--sweep depth` or `--sweep batch` with it."),
        (o.sweep and o.memory, "`--sweep` and `--memory` are runs of their own; give one of them."),
        (kind not in ("cpu", "cuda"), f"`--device {o.device}` is not known; use cpu or cuda."),
        (kind == "cuda" and not torch.cuda.is_available(), f"`--device {o.device}`: this torch sees no GPU."),
        *((path not in (None, "-") and not Path(path).absolute().parent.is_dir(),
           f"`--{name} {path}`: there is no such folder.")
          for name, path in (("csv", o.csv), ("json", o.json), ("plot", o.plot))),
    ):  # fmt: skip
        if wrong:
            raise WrongArguments(says)
    if o.plot is not None:
        figure("`--plot`", 1, 1)
    if o.memory is not None and kind == "cpu":
        data_bytes()
    return o


def _defaults(given: Mapping[str, Any]) -> Options:
    """Return what holds where nothing else is given, for a run of this kind."""
    short = any(given.get(name) for name in ("quick", "sweep", "memory"))
    ways = tuple(name for name, way in WAYS.items() if not (short and way.compiled))
    return Options(ways=ways, rounds=QUICK_ROUNDS if given.get("quick") else ROUNDS)


def _known(what: str, asked: Iterable[str], known: Iterable[str]) -> tuple[str, ...]:
    """Return the names that were asked for, each once, in a fixed order."""
    names = [n for part in asked for n in part.split(",") if n]
    unknown = [n for n in names if n not in known]
    if unknown or not names:
        raise WrongArguments(f"unknown {what[:-1]} {', '.join(map(repr, unknown))}; known: {', '.join(known)}.")
    return tuple(n for n in known if n in names)


def parse_size(text: str) -> int:
    """Return the bytes that a text such as 512MiB or 1.5GiB stands for."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = UNITS.get((match[2] or "b").lower()) if match else None
    if match is None or unit is None or not (size := int(float(match[1]) * unit)):
        raise WrongArguments(f"`--memory {text}`: use a number with KiB, MiB or GiB, such as 512MiB.")
    return size


def words_of(o: Options, without: Collection[str] = ()) -> list[str]:
    """Return the command line that asks for this, but for some of its options."""
    default = _defaults(asdict(o))
    words = ["revfx", "bench"]
    for name in ARGUMENTS:
        value = getattr(o, name)
        if name not in without and value != getattr(default, name):
            words.append(f"--{name}")
            words += () if value is True else map(str, value if isinstance(value, tuple) else (value,))
    return words
