"""What `revfx bench` is asked for: its arguments, checked."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from revfx.bench.fit import data_bytes
from revfx.bench.models import MODELS
from revfx.bench.ways import WAYS
from revfx.report.figures import figure_class


UNITS: Mapping[str, int] = {"b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}
ROUNDS, QUICK_ROUNDS, QUICK_DEPTH, QUICK_BATCH = 9, 2, 4, 2  # the last divides the batch
SWEPT: Mapping[str, tuple[int, ...]] = {"depth": (4, 8, 16, 32), "batch": (1, 2, 4, 8)}  # the latter: of a quarter


class UsageError(Exception):
    """An argument that makes no sense; the text says which, and what would."""


@dataclass(frozen=True)
class Options:
    """The arguments of `revfx bench` after a look at them; None and empty stand for the defaults."""

    models: tuple[str, ...]
    ways: tuple[str, ...]
    depth: int | None = None
    batch: int | None = None
    rounds: int = ROUNDS
    sweep: str | None = None
    at: tuple[int, ...] = ()
    memory: int | None = None
    seconds: float = 30.0
    quick: bool = False
    threads: int | None = None
    device: str = "cpu"
    csv: str | None = None
    json: str | None = None
    plot: str | None = None
    markdown: bool = False

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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `revfx bench` to `parser`."""
    add = parser.add_argument
    add("--models", nargs="+", metavar="NAME", help=f"of {', '.join(MODELS)} (default: all)")
    add("--ways", nargs="+", metavar="NAME", help=f"of {', '.join(WAYS)} (default: all; plain is always among them)")
    add("--depth", type=int, metavar="N", help="blocks of each model (default: each model's own)")
    add("--batch", type=int, metavar="N", help="samples (default: each model's own)")
    add("--rounds", type=int, metavar="N", help=f"steps of each way, taken in turn (default: {ROUNDS})")
    add("--sweep", metavar="WHAT", help="depth or batch: memory at several of them, instead of times")
    add("--at", nargs="+", type=int, metavar="N", help="the depths or batches of the sweep")
    add("--memory", metavar="SIZE", help="the largest depth and batch that train in so much, such as 512MiB or 2GiB")
    add("--seconds", type=float, metavar="S", help="for each search of --memory (default: 30)")
    add("--quick", action="store_true", help="small models, two rounds, nothing that compiles: half a minute")
    add("--threads", type=int, metavar="N", help="of torch (default: as it is)")
    add("--device", metavar="NAME", help="cpu (default) or cuda")
    add("--csv", metavar="PATH", help="also write the figures there")
    add(
        "--json", nargs="?", const="-", metavar="PATH", help="also write all there; without a path, to stdout and alone"
    )
    add("--plot", metavar="PATH", help="also draw them there (svg, png, pdf; needs matplotlib)")
    add("--markdown", action="store_true", help="print Markdown")


def options_of(args: argparse.Namespace) -> Options:
    """Check the arguments; compiled ways are left out of quick runs, sweeps and searches unless they are named.

    Raises:
        UsageError: one of them makes no sense, here.
    """
    given: dict[str, Any] = {f.name: getattr(args, f.name, None) for f in fields(Options)}
    given = {name: value for name, value in given.items() if value is not None}
    quick, sweep, memory = (given.get(name) for name in ("quick", "sweep", "memory"))
    given["models"] = _known("model", given.get("models"), MODELS)
    ways = _known("way", given.get("ways"), _default_ways(bool(quick or sweep or memory)), WAYS)
    given["ways"] = tuple(n for n in WAYS if n == "plain" or n in ways)
    if quick:
        given.setdefault("rounds", QUICK_ROUNDS)
    if "memory" in given:
        given["memory"] = parse_size(given["memory"])
    given["at"] = tuple(given.get("at", ()))
    for name in ("depth", "batch", "rounds", "seconds", "threads"):
        if given.get(name, 1) <= 0:
            raise UsageError(f"`--{name} {given[name]}`: it must be positive.")
    if any(n <= 0 for n in given["at"]):
        raise UsageError(f"`--at {' '.join(map(str, given['at']))}`: they must be positive.")
    options = Options(**given)
    _check_together(options)
    return options


def _default_ways(short: bool) -> tuple[str, ...]:
    return tuple(name for name, way in WAYS.items() if not (short and way.compiled))


def _known(
    what: str, asked: Iterable[str] | None, default: Iterable[str], known: Iterable[str] = ()
) -> tuple[str, ...]:
    """Return the names that were asked for, each once, in a fixed order."""
    known = list(known or default)
    if asked is None:
        return tuple(default)
    names = [n for part in asked for n in part.split(",") if n]
    unknown = [n for n in names if n not in known]
    if unknown or not names:
        raise UsageError(f"unknown {what} {', '.join(map(repr, unknown))}; known: {', '.join(known)}.")
    return tuple(n for n in known if n in names)


def parse_size(text: str) -> int:
    """Return the bytes that a text such as 512MiB or 1.5GiB stands for.

    Raises:
        UsageError: it is none.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = UNITS.get((match[2] or "b").lower()) if match else None
    if match is None or unit is None or not (size := int(float(match[1]) * unit)):
        raise UsageError(f"`--memory {text}`: use a number with KiB, MiB or GiB, such as 512MiB.")
    return size


def _check_together(o: Options) -> None:
    if o.sweep not in (None, *SWEPT):
        raise UsageError(f"`--sweep {o.sweep}` is not known; use {' or '.join(SWEPT)}.")
    if o.at and o.sweep is None:
        raise UsageError("`--at` says where a sweep looks; give `--sweep depth` or `--sweep batch` with it.")
    if o.sweep is not None and o.memory is not None:
        raise UsageError("`--sweep` and `--memory` are runs of their own; give one of them.")
    kind = o.device.split(":")[0]
    if kind not in ("cpu", "cuda"):
        raise UsageError(f"`--device {o.device}` is not known; use cpu or cuda.")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"`--device {o.device}`: this torch sees no GPU.")
    for name, path in (("csv", o.csv), ("json", o.json), ("plot", o.plot)):
        if path not in (None, "-") and not Path(path).absolute().parent.is_dir():
            raise UsageError(f"`--{name} {path}`: there is no such folder.")
    if o.plot is not None:
        figure_class("`--plot`")
    if o.memory is not None and kind == "cpu":
        data_bytes()


def command_of(o: Options) -> str:
    """Return the command line that asks for this."""
    default = Options(
        tuple(MODELS),
        _default_ways(bool(o.quick or o.sweep or o.memory)),
        rounds=QUICK_ROUNDS if o.quick else ROUNDS,
    )
    words = ["revfx", "bench"]
    for f in fields(o):
        value = getattr(o, f.name)
        if f.name in ("csv", "json", "plot", "markdown") or value == getattr(default, f.name):
            continue  # where and how the figures were written says nothing of them
        words.append(f"--{f.name}")
        if value is not True:
            words += map(str, value if isinstance(value, tuple) else (value,))
    return shlex.join(words)
