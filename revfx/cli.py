"""The command line: `revfx explain`, `revfx demo` and `revfx bench`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence

from revfx.errors import RevfxError, WrongArguments


EXAMPLES = """examples:
  revfx demo                                             train a RevNet on digits, plainly and converted
  revfx explain model.py:make_model --input 8,3,32,32    what would revfx do with this model?
  revfx explain model.py:Net --input 16,64:int64 --measure --save net.html
  revfx explain model.py:Net --input 8,512 --backend revfx --json
  revfx bench --models mlp,flow --depth 8                compare with what else there is

exit status: 0 if all went well, 1 if nothing reversible was found or something failed, 2 for wrong arguments
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0, 1 (failed, or nothing reversible found) or 2 (wrong arguments)."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler would report its start and stop
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 2
    try:
        return args.run(args)
    except WrongArguments as e:
        return _fail(args, e, 2)
    except KeyboardInterrupt:
        print("revfx: stopped", file=sys.stderr)
        return 130
    except Exception as e:
        return _fail(args, e, 1)


def _fail(args: argparse.Namespace, error: Exception, status: int) -> int:
    if args.debug:
        raise error
    kind = "" if isinstance(error, RevfxError) else f"{type(error).__name__}: "
    print(f"revfx {args.command}: {kind}{error}", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="revfx",
        description="Depth-free activation memory for PyTorch models, by inferred reversibility.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    from revfx import __version__

    parser.add_argument("--version", action="version", version=f"revfx {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="{explain,demo,bench}")
    for name, text, fill in (
        ("explain", "say what revfx finds in a model, what it saves and what it costs", _explain_arguments),
        ("demo", "train a RevNet on handwritten digits, plainly and converted, and compare", _demo_arguments),
        ("bench", "compare memory, time and gradients with other ways to train reversible models", _bench_arguments),
    ):
        command = commands.add_parser(
            name, help=text, description=text[0].upper() + text[1:] + ".", epilog=EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        command.set_defaults(run=fill(command))
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


Run = Callable[[argparse.Namespace], int]


def _explain_arguments(parser: argparse.ArgumentParser) -> Run:
    add = parser.add_argument
    model = "a file, and in it a module, a class of modules, or a function that returns a module, or (module, inputs)"
    add("model", metavar="FILE.py:FACTORY", help=model)
    shape = "the shape of one tensor argument, such as 8,3,32,32 or 16,64:int64; repeat it for further arguments"
    add("--input", action="append", default=[], metavar="SHAPE[:DTYPE]", help=shape)
    add("--dtype", default="float32", help="of inputs that don't say theirs (default: float32)")
    add("--measure", action="store_true", help="also train a few real steps and measure them")
    add("--backend", choices=["revfx"], help="of torch.compile: the regions of each of its graphs")
    add("--exact", action="store_true", help="with convert(exact=True)")
    add("--anchor-every", type=int, metavar="K", help="with convert(anchor_every=K)")
    add("--save", metavar="PATH", help="write a page (.html), the graph (.svg) or the data (.json)")
    add("--json", action="store_true", help="print the data as JSON, and nothing else")
    return _explain


def _explain(args: argparse.Namespace) -> int:
    import revfx
    from revfx.cli_models import load
    from revfx.report.progress import bar

    if args.save and not args.save.endswith((".html", ".svg", ".json")):
        raise WrongArguments(f"--save {args.save}: the name must end in .html, .svg or .json")
    with bar(5 if args.measure else 3, "loading"):
        model, inputs = load(args.model, args.input, args.dtype)
        if args.exact or args.anchor_every is not None:
            try:
                model = revfx.convert(model, exact=args.exact, anchor_every=args.anchor_every)
            except ValueError as e:
                raise WrongArguments(str(e)) from e
        found = revfx.explain(model, *inputs, measure=args.measure, backend=args.backend)
        if args.save:
            found.save(args.save)
    print(json.dumps(found.to_dict()) if args.json else found)
    if args.save and not args.json:
        print(f"saved {args.save}")
    return 0 if found.regions else 1


def _demo_arguments(parser: argparse.ArgumentParser) -> Run:
    add = parser.add_argument
    add("--epochs", type=int, default=4, help="default: 4")
    add("--depth", type=int, default=8, help="couplings of convolutions (default: 8)")
    add("--exact", action="store_true", help="gradients that are bitwise those of stored activations")
    add("--save", default="revfx-demo.html", metavar="PATH", help="the page to write (default: revfx-demo.html)")
    add("--json", action="store_true", help="print the result as JSON, and nothing else")

    def run(args: argparse.Namespace) -> int:
        from revfx.demo import demo

        return demo(args.epochs, args.depth, args.exact, args.save, args.json)

    return run


def _bench_arguments(parser: argparse.ArgumentParser) -> Run:
    from revfx.bench import command as bench

    bench.add_arguments(parser)
    return bench.main
