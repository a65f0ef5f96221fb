"""`revfx bench`: memory, time and gradients of one model trained in many ways, in one interleaved run.

It measures in a child process, with an allocator that keeps what it has: page faults would be part of the times
otherwise, more of them the more a way allocates.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from revfx.bench import report as bench_report
from revfx.bench.fit import Question, largest
from revfx.bench.measure import Setting, measure_steps, prepare
from revfx.bench.models import MODELS
from revfx.bench.options import WRITTEN, Options, options_of, words_of
from revfx.bench.results import Fit, Report, Row, this_machine
from revfx.bench.ways import WAYS
from revfx.errors import RevfxError, WrongArguments
from revfx.report.progress import bar


# glibc reads the first two when a process starts, torch the others
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "1000000000",
    "MALLOC_TRIM_THRESHOLD_": "4000000000",
    "KINETO_LOG_LEVEL": "99",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}


def main(args: argparse.Namespace) -> int:
    """Run the command and return its exit status: 1 if one of revfx's own ways, or plain autograd, failed."""
    try:
        options = options_of(args)
    except RevfxError as e:
        raise WrongArguments(str(e)) from e
    if all(name in os.environ for name in ENVIRONMENT):
        return run(options)
    command = [sys.executable, "-m", *words_of(options), *["--debug"] * args.debug]
    status = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, check=False).returncode
    if status not in (0, 1):
        raise RevfxError(f"the process that measures ended with status {status}.")
    return status


def run(options: Options) -> int:
    """Measure in this process, print and write what was asked for, and return the exit status."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    alone = options.json == "-"
    with contextlib.redirect_stdout(sys.stderr) if alone else contextlib.nullcontext():
        report = measured(options)
    if not alone:
        print(bench_report.markdown(report) if options.markdown else bench_report.text(report))
    for path, form in ((options.json, bench_report.as_json), (options.csv, bench_report.as_csv)):
        if path == "-":
            print(form(report).rstrip("\n"))
        elif path is not None:
            Path(path).write_text(form(report).rstrip("\n") + "\n")
    if options.plot is not None:
        bench_report.plot(report, options.plot)
    return int(any(r.failed and (r.way == "plain" or WAYS[r.way].own) for r in report.found))


def measured(options: Options) -> Report:
    """Return the report of what the options ask for."""
    o, found = options, list[Row | Fit]()
    if o.sweep is None and o.memory is None:
        with bar(len(o.models) * (len(o.ways) + o.rounds + 1)) as tick:
            for name in o.models:
                setting = Setting(MODELS[name], *o.sizes(name), o.device)
                found += measure_steps(setting, [WAYS[w] for w in o.ways], o.rounds, tick)
    else:
        jobs = list(_jobs(o))
        with bar(len(jobs)) as tick:
            for words, job in jobs:
                tick(words)
                found.append(job())
    rows, fits = tuple(r for r in found if isinstance(r, Row)), tuple(f for f in found if isinstance(f, Fit))
    return Report(shlex.join(words_of(o, WRITTEN)), this_machine(o.device), rows, fits, o.sweep)


def _jobs(o: Options) -> Iterator[tuple[str, Callable[[], Row | Fit]]]:
    """Yield what a sweep or a search does, each with a few words about it."""
    for name, way in itertools.product(o.models, o.ways):
        depth, batch = o.sizes(name)
        for n in o.swept(name):
            size = (n, batch) if o.sweep == "depth" else (depth, n)
            setting = Setting(MODELS[name], *size, o.device)
            yield f"{name}, {way}, {o.sweep} {n}", lambda setting=setting, way=way: prepare(setting, WAYS[way]).row
        if o.memory is None:
            continue
        for sweep, other in (("depth", batch), ("batch", depth)):
            question = Question(name, way, sweep, other, o.memory, o.device, torch.get_num_threads(), o.seconds)
            yield f"{name}, {way}, {sweep}", partial(largest, question)
