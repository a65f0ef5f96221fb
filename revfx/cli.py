"""The command line: `revfx explain` and `revfx fit`."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import revfx
from revfx.cli_models import WrongArguments, load
from revfx.errors import RevfxError
from revfx.units import parse_size, size


EXAMPLES = """examples:
  revfx explain model.py:make_model --input 8,3,32,32    the findings of revfx in this model
  revfx explain model.py:Net --input 16,64:int64 --measure --save net.html
  revfx explain model.py:Net --input 8,512 --backend revfx --json
  revfx fit model.py:Net --input 8,3,32,32 --memory 2GiB  the largest batch that trains in so much memory
  revfx fit model.py:Net --input 8,3,32,32 --device-memory 24GiB --optimizer adamw

exit status: 0 if all went well, 1 if nothing reversible was found, a budget is too small or something failed, 2 for
wrong arguments
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    0: success. 1: it failed, nothing reversible was found, or a budget is too small. 2: wrong arguments.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler would report its start and stop
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 2
    if sys.stderr.isatty():
        logging.basicConfig(format="revfx: %(message)s")
        logging.getLogger("revfx.report").setLevel(logging.INFO)  # the stages of long commands
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print("revfx: stopped", file=sys.stderr)
        return 130
    except Exception as e:
        if args.debug:
            raise
        text = str(e) if isinstance(e, RevfxError) else f"{type(e).__name__}: {e}"
        print(f"revfx {args.command}: {text}", file=sys.stderr)
        return 2 if isinstance(e, WrongArguments) else 1


def _parser() -> argparse.ArgumentParser:
    layout: Any = {"epilog": EXAMPLES, "formatter_class": argparse.RawDescriptionHelpFormatter}
    text = "Train PyTorch models in less memory, bit for bit: inferred reversible layers and memory budgets."
    parser = argparse.ArgumentParser(prog="revfx", description=text, **layout)
    parser.add_argument("--version", action="version", version=f"revfx {revfx.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="{explain,fit}")
    for name, run, text, arguments in (
        ("explain", _explain, "report the findings of revfx in a model, their memory and cost", EXPLAIN),
        ("fit", _fit, "find the largest batch that trains within a budget of memory", FIT),
    ):
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", **layout)
        command.set_defaults(run=run)
        for flag, settings in arguments.items():
            command.add_argument(flag, **settings)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


EXPLAIN: Mapping[str, dict[str, Any]] = {
    "model": dict(
        metavar="FILE.py:FACTORY",
        help="a file, and in it a module, a class of modules, or a function that returns a module, or (module, inputs)",
    ),
    "--input": dict(
        action="append",
        default=[],
        metavar="SHAPE[:DTYPE]",
        help="the shape of one tensor argument, such as 8,3,32,32 or 16,64:int64; repeat it for further arguments",
    ),
    "--dtype": dict(default="float32", help="of inputs that don't say theirs (default: float32)"),
    "--measure": dict(action="store_true", help="also train a few real steps and measure them"),
    "--backend": dict(choices=["revfx"], help="of torch.compile: the regions of each of its graphs"),
    "--rounding": dict(action="store_true", help="with convert(exact=False)"),
    "--memory": dict(metavar="BUDGET", help="plan for a budget: 2GiB, 800MB, 60%%"),
    "--save": dict(metavar="PATH", help="write a page (.html), memory over a step (.svg) or the data (.json)"),
    "--json": dict(action="store_true", help="print the data as JSON, and nothing else"),
}
FIT: Mapping[str, dict[str, Any]] = {
    **{name: EXPLAIN[name] for name in ("model", "--input", "--dtype", "--json")},
    "--memory": dict(metavar="BUDGET", help="bytes of a training step: 2GiB, 800MB"),
    "--device-memory": dict(
        metavar="BYTES",
        help="bytes of the device, which parameters, gradients and optimizer state share with the step: 24GiB",
    ),
    "--optimizer": dict(default="adamw", help="with --device-memory: adamw (default), adam, momentum or sgd"),
}


def _explain(args: argparse.Namespace) -> int:
    if args.save and not args.save.endswith((".html", ".svg", ".json")):
        raise WrongArguments(f"--save {args.save}: the name must end in .html, .svg or .json")
    model, inputs = load(args.model, args.input, args.dtype)
    if args.rounding:
        model = revfx.convert(model, exact=False)
    found = revfx.explain(model, inputs, memory=args.memory, measure=args.measure, backend=args.backend)
    if args.save:
        found.save(args.save)
    if args.json:
        print(json.dumps(found.to_dict()))
    else:
        print(found)
        if args.save:
            print(f"saved {args.save}")
    if found.fit is not None:
        return 0 if found.fit.is_feasible else 1
    return 0 if found.regions else 1


def _fit(args: argparse.Namespace) -> int:
    from revfx.report.fit import largest, resident_bytes

    if (args.memory is None) == (args.device_memory is None):
        raise WrongArguments("give either --memory, the bytes of a step, or --device-memory, those of the device")
    model, inputs = load(args.model, args.input, args.dtype)
    try:
        memory, resident = args.memory, 0
        if args.device_memory is not None:
            resident = resident_bytes(model, args.optimizer)
            memory = (parse_size(args.device_memory) or 0) - resident
            if memory <= 0:
                reason = f"parameters, gradients and optimizer state take {size(resident)}"
                raise ValueError(f"--device-memory {args.device_memory}: {reason}. Give more bytes, such as 24GiB")
        found = replace(largest(model, inputs, memory), resident=resident)
    except ValueError as e:
        raise WrongArguments(str(e)) from e
    if args.json:
        print(json.dumps(asdict(found)))
    else:
        print(found)
    return 0 if found.batch else 1
