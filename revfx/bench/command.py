"""`revfx bench`: memory, time and gradients of one model trained in many ways, in one interleaved run.

`python -m revfx.bench.command` is the child process in which `main` measures, with an allocator that keeps what it
has: page faults would be part of the times otherwise, more of them the more a way allocates.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from revfx.bench import plot, report as bench_report
from revfx.bench.fit import Question, largest
from revfx.bench.measure import measure_size, measure_steps
from revfx.bench.models import MODELS
from revfx.bench.options import Options, UsageError, add_arguments as add_arguments, command_of, options_of
from revfx.bench.results import Fit, Report, Row, this_machine
from revfx.bench.ways import WAYS
from revfx.errors import RevfxError
from revfx.report.progress import bar


# glibc reads the first two when a process starts, torch the others
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "1000000000",
    "MALLOC_TRIM_THRESHOLD_": "4000000000",
    "KINETO_LOG_LEVEL": "99",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}


def main(args: argparse.Namespace) -> int:
    """Run the command and return its exit status.

    0; 1 if one of revfx's own ways, or plain autograd, raised or gave wrong gradients; 2 for arguments without sense.
    """
    try:
        options = options_of(args)
    except (UsageError, RevfxError) as e:
        print(f"revfx bench: {e}", file=sys.stderr)
        return 2
    if all(name in os.environ for name in ENVIRONMENT):
        return run(options)
    command = [sys.executable, "-m", "revfx.bench.command", json.dumps(asdict(options))]
    done = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, check=False)
    if done.returncode not in (0, 1):
        print(f"revfx bench: the process that measures ended with status {done.returncode}.", file=sys.stderr)
    return done.returncode if done.returncode in (0, 1) else 1


def run(options: Options) -> int:
    """Measure in this process, print and write what was asked for, and return the exit status."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    alone = options.json == "-"
    with contextlib.redirect_stdout(sys.stderr) if alone else contextlib.nullcontext():
        report = measured(options)
    if not alone:
        print(bench_report.markdown(report) if options.markdown else bench_report.text(report))
    if options.json is not None:
        _write(options.json, bench_report.as_json(report))
    if options.csv is not None:
        _write(options.csv, bench_report.as_csv(report))
    if options.plot is not None:
        plot.plot(report, options.plot)
    return int(any(r.failed and (r.way == "plain" or WAYS[r.way].own) for r in report.found))


def _write(path: str, text: str) -> None:
    if path == "-":
        print(text.rstrip("\n"))
    else:
        Path(path).write_text(text.rstrip("\n") + "\n")


def measured(options: Options) -> Report:
    """Return the report of what the options ask for."""
    rows: list[Row] = []
    fits: list[Fit] = []
    if options.memory is not None:
        fits = _fits(options, options.memory)
    elif options.sweep is not None:
        rows = _sweep(options)
    else:
        with bar(len(options.models) * (len(options.ways) + options.rounds + 1)) as tick:
            for name in options.models:
                ways = [WAYS[w] for w in options.ways]
                depth, batch = options.sizes(name)
                rows += measure_steps(MODELS[name], ways, depth, batch, options.rounds, options.device, tick)
    machine = this_machine(options.device)
    return Report(command_of(options), machine, tuple(rows), tuple(fits), options.sweep)


def _sweep(options: Options) -> list[Row]:
    rows: list[Row] = []
    with bar(sum(len(options.swept(m)) for m in options.models) * len(options.ways)) as tick:
        for name in options.models:
            depth, batch = options.sizes(name)
            for way in options.ways:
                for n in options.swept(name):
                    tick(f"{name}, {way}, {options.sweep} {n}")
                    size = (n, batch) if options.sweep == "depth" else (depth, n)
                    rows.append(measure_size(MODELS[name], WAYS[way], *size, options.device))
    return rows


def _fits(options: Options, memory: int) -> list[Fit]:
    fits: list[Fit] = []
    with bar(len(options.models) * len(options.ways) * 2) as tick:
        for name in options.models:
            depth, batch = options.sizes(name)
            for way in options.ways:
                for sweep, other in (("depth", batch), ("batch", depth)):
                    tick(f"{name}, {way}, {sweep}")
                    threads, seconds = torch.get_num_threads(), options.seconds
                    fits.append(largest(Question(name, way, sweep, other, memory, options.device, threads, seconds)))
    return fits


def _options(text: str) -> Options:
    """Read the options that `main` passes to its child process."""
    given: dict[str, Any] = json.loads(text)
    given |= {name: tuple(given[name]) for name in ("models", "ways", "at")}
    return Options(**given)


if __name__ == "__main__":
    sys.exit(run(_options(sys.argv[1])))
