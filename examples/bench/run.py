"""Memory, time and gradients of one model trained in many ways, in one table.

    python examples/bench                                        # chains of couplings, and two ordinary models
    python examples/bench --short                                # small models, one budget, nothing that compiles
    python examples/bench --threads 1 --models mlp,revnet --ways convert,memory,revlib
    python examples/bench --threads 1 --models gpt2,resnet50 --ways checkpoint,memory --precision bf16
    python examples/bench --models transformer --ways checkpoint,convert --precision bf16 --card H100
    python examples/bench --tiny --ways revtorch,convert         # the time that the host needs for a step

Every figure of the first table is measured. Bytes are those beyond what is there before a step, by torch's profiler (on
a GPU by its allocator), the most of three steps. Times are medians of rounds in which every way takes one step, with
the quartiles of the ratio to plain in brackets. "bits": losses, gradients and buffers of three steps are plain's, bit
for bit.

`--count` prints a second table, for accelerators: the kernels that a forward and a backward launch, and their traffic,
the bytes that they read and write. The traffic leaves out matrix products, attention and convolutions. "+" is the
excess over plain's: launches per coupling (a block of a chain), and bytes per element of both streams of a coupling.
`--card` adds the roofline's time, a sum over all kernels. A kernel takes as long as its launch, its traffic or its
FLOPs at the card's bf16 rate, whichever is longest. See `count.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import platform
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from tqdm import tqdm

from bench.count import CARDS, Card, Counts, count
from bench.measure import Row, Sizes, measure
from bench.models import MODELS, TINY_MODELS, BenchModel
from bench.ways import LEAST, WAYS, Way, missing


DEFAULT_MODELS = ("mlp", "revnet", "transformer", "flow", "leapfrog", "encoder", "lstm")
SHORT_MODELS = ("mlp", "encoder")
SHORT_DEPTH, SHORT_BATCH_DIVISOR, SHORT_BUDGETS = 3, 8, "60"  # blocks; of the batch; percentages
ROUNDS = 9
HEAD = ("model", "way", "kept", "peak", "peak/plain", "step", "time/plain", "first step", "gradients")
WIDTHS = (12, 47, 11, 11, 10, 11, 18, 10, 17)
COUNT_HEAD = ("model", "way", "launches", "+/coupling", "traffic", "+bytes/element")
COUNT_WIDTHS = (12, 47, 9, 11, 12, 15)
CARD_WIDTHS = (13, 11)
MIB = 2**20
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, and return 1 if one of revfx's own ways failed."""
    parser = _parser()
    args = parser.parse_args(argv)
    known = TINY_MODELS if args.tiny else MODELS
    models, ways = _chosen(args, known, parser)
    is_counted = args.count or args.card is not None
    if args.threads or args.short or args.tiny:
        torch.set_num_threads(args.threads or 1)
    _keep_memory()
    torch._dynamo.config.recompile_limit = 64  # ways share the code of a model's class
    rounds = args.rounds or (1 if args.short else ROUNDS)
    steps = sum(len(way.settings) for way in ways) + rounds + 1
    rows: list[Row] = []
    _print_head(HEAD, WIDTHS, args.markdown)
    with tqdm(total=steps * len(models), file=sys.stderr, leave=False, disable=None) as bar:

        def tick(text: str) -> None:
            bar.set_description_str(text.replace("`", ""), refresh=False)
            bar.update()

        for name in models:
            depth, batch = args.depth, args.batch
            if args.short:
                depth, batch = depth or SHORT_DEPTH, batch or max(2, known[name].batch // SHORT_BATCH_DIVISOR)
            sizes = Sizes(depth, batch, args.device, args.precision == "bf16", args.compile)
            found = measure(known[name], ways, rounds, sizes, tick)
            rows += found
            for row in found:
                if row.peak is not None:
                    _print_line(_cells(row), WIDTHS, args.markdown)
            if is_counted:
                _count(found, known[name], ways, sizes)
    if is_counted:
        _print_counts(rows, args.card, args.markdown)
    _print_notes(rows, args.markdown)
    print(f"\n(`python examples/bench {' '.join(sys.argv[1:] if argv is None else argv)}`; {_machine(args.device)})")
    return int(any(row.is_failed for row in rows))


# --- arguments
def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python examples/bench", description=__doc__, formatter_class=raw)
    parser.add_argument("--models", help=f"of {', '.join(MODELS)}; default: {','.join(DEFAULT_MODELS)}")
    parser.add_argument("--ways", help=f"of {', '.join(WAYS)}; default: all. plain is always measured")
    parser.add_argument("--budgets", help="for the way `memory`: percentages of plain's peak, and `least`")
    parser.add_argument("--depth", type=_positive, help="blocks; default: each model's own")
    parser.add_argument("--batch", type=_positive, help="samples; default: each model's own")
    parser.add_argument("--rounds", type=_positive, help=f"steps of each way, taken in turn; default: {ROUNDS}")
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32", help="bf16: autocast")
    parser.add_argument("--compile", action="store_true", help="compile each block, in `plain` and `memory`")
    parser.add_argument("--short", action="store_true", help="small models, one round, nothing that compiles")
    parser.add_argument("--tiny", action="store_true", help="narrow chains, whose steps take the host's time")
    parser.add_argument("--count", action="store_true", help="count kernels and their bytes, as on an accelerator")
    parser.add_argument("--card", help=f"of {', '.join(CARDS)}: add the roofline's time to the counts")
    parser.add_argument("--threads", type=_positive, help="of torch; default: as it is; 1 with --short or --tiny")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    return parser


def _chosen(
    args: argparse.Namespace, known: Mapping[str, BenchModel], parser: argparse.ArgumentParser
) -> tuple[list[str], list[Way]]:
    """Check the arguments and return models and ways; plain is the first way."""
    device = args.device.split(":")[0]
    if device not in ("cpu", "cuda"):
        parser.error(f"--device {args.device}: use cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: torch finds no GPU")
    if args.card is not None and args.card not in CARDS:
        parser.error(f"unknown card {args.card!r}; known: {', '.join(CARDS)}")
    models = _names("model", args.models, known, parser)
    if not models:
        models = [name for name in (SHORT_MODELS if args.short else DEFAULT_MODELS) if name in known]
    for name in models:
        if text := missing(known[name].library, known[name].library):
            parser.error(f"--models {name}: {text}")
    names = _names("way", args.ways, WAYS, parser)
    for name in names:
        if text := WAYS[name].missing():
            parser.error(f"--ways {name}: {text}")
    if not names:
        names = [n for n, way in WAYS.items() if not (args.short and way.compiles)]
    ways = [WAYS[name] for name in WAYS if name in names or name == "plain"]
    budgets = args.budgets or (SHORT_BUDGETS if args.short else "")
    if budgets:
        settings = _budgets(budgets, parser)
        ways = [replace(way, settings=settings) if way.name == "memory" else way for way in ways]
    return models, ways


def _names(kind: str, text: str | None, known: Mapping[str, Any], parser: argparse.ArgumentParser) -> list[str]:
    names = [name.strip() for name in (text or "").split(",") if name.strip()]
    for name in names:
        if name not in known:
            parser.error(f"unknown {kind} {name!r}; known: {', '.join(known)}")
    return names


def _budgets(text: str, parser: argparse.ArgumentParser) -> tuple[float | str, ...]:
    budgets: list[float | str] = []
    for part in text.split(","):
        if part == LEAST:
            budgets.append(part)
            continue
        number = float(part) if re.fullmatch(r"\d+(\.\d*)?", part) else 0.0
        if not 0 < number <= 100:
            parser.error(f"--budgets {text}: give percentages of plain's peak, or {LEAST}, such as 80,40,{LEAST}")
        budgets.append(number)
    return tuple(budgets)


def _positive(text: str) -> int:
    number = int(text)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"{text}: it must be positive")
    return number


# --- counts
def _count(rows: Sequence[Row], model: BenchModel, ways: Sequence[Way], sizes: Sizes) -> None:
    """Count the kernels of a step for each row that has figures; an error becomes a note of the row."""
    by_name = {way.name: way for way in ways}
    for row in rows:
        way = by_name[row.way]
        if row.peak is None:
            continue
        if way.compiles or sizes.is_compiled:
            row.notes.append("kernels of compiled code are not counted")
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                row.counts = count(replace(sizes, device="cpu").make(model), way, row.setting)
        except Exception as e:  # of any class: the code is a library's
            row.notes.append(f"kernels could not be counted: {type(e).__name__}: {e}")


def _print_counts(rows: Sequence[Row], card: str | None, is_markdown: bool) -> None:
    head, widths = COUNT_HEAD, COUNT_WIDTHS
    if card is not None:
        head, widths = (*head, f"{card} step", "time/plain"), (*widths, *CARD_WIDTHS)
    print()
    _print_head(head, widths, is_markdown)
    plain: Counts | None = None
    for row in rows:
        if row.way == "plain":
            plain = row.counts
        if row.counts is not None and plain is not None:
            cells = (row.model, row.title, *_count_cells(row.counts, plain, None if card is None else CARDS[card]))
            _print_line(cells, widths, is_markdown)


def _count_cells(counts: Counts, plain: Counts, card: Card | None) -> list[str]:
    """Format the counts of a way, compared with plain's."""
    cells = [str(counts.launches), "", _mib(counts.nbytes), ""]
    if counts.couplings:
        cells[1] = f"{(counts.launches - plain.launches) / counts.couplings:.1f}"
        cells[3] = f"{(counts.nbytes - plain.nbytes) / counts.elements:.1f}"
    if card is not None:
        seconds = counts.seconds(card)
        cells += [f"{1e3 * seconds:.3f} ms", f"{seconds / plain.seconds(card):.2f}"]
    return cells


# --- the table
def _cells(row: Row) -> tuple[str, ...]:
    """Format a row of the table."""
    share = "" if row.share is None else f"{row.share:.3f}"
    first = "" if row.first is None else f"{row.first:.1f} s"
    seconds = ratio = ""
    if row.seconds is not None and row.ratio is not None:
        low, middle, high = row.ratio
        seconds, ratio = f"{1e3 * row.seconds:.1f} ms", f"{middle:.2f} ({low:.2f}-{high:.2f})"
    bits = ""
    if row.error is not None:
        bits = "bits" if row.is_bitwise else f"{row.error:.0e}" if row.error else "bits, not buffers"
    return (row.model, row.title, _mib(row.kept), _mib(row.peak), share, seconds, ratio, first, bits)


def _mib(nbytes: int | None) -> str:
    return "" if nbytes is None else f"{nbytes / MIB:.2f} MiB"


def _print_head(head: Sequence[str], widths: Sequence[int], is_markdown: bool) -> None:
    _print_line(head, widths, is_markdown)
    if is_markdown:
        print("|" + "---|" * 2 + "---:|" * (len(head) - 2))


def _print_line(cells: Sequence[str], widths: Sequence[int], is_markdown: bool) -> None:
    if is_markdown:
        tqdm.write("| " + " | ".join(cells) + " |")
        return
    padded: list[str] = []
    for i, (cell, width) in enumerate(zip(cells, widths, strict=True)):
        cell = cell.replace("`", "")
        padded.append(cell.ljust(width) if i < 2 else cell.rjust(width))
    tqdm.write(" ".join(padded).rstrip())


def _print_notes(rows: Sequence[Row], is_markdown: bool) -> None:
    """Print each note once, after the ways and models that have it."""
    models: dict[tuple[str, str], list[str]] = {}  # by title and note
    for row in rows:
        for note in row.notes:
            models.setdefault((row.title, note), []).append(row.model)
    titles: dict[tuple[str, str], list[str]] = {}  # by note and models
    for (title, note), names in models.items():
        titles.setdefault((note, ", ".join(names)), []).append(title)
    for (note, names), ways in titles.items():
        line = f"- {', '.join(ways)} ({names}): {note}"
        print(line if is_markdown else line.replace("`", ""))


def _machine(device: str) -> str:
    processor = torch.cuda.get_device_name(device) if device != "cpu" else platform.processor() or platform.machine()
    return f"{processor}, {os.cpu_count()} cores, threads: {torch.get_num_threads()}; torch {torch.__version__}"


def _keep_memory() -> None:
    """Let glibc keep freed memory: to return it and request it once more takes longer than the compared steps."""
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
