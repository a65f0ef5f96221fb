"""Running the graphs of replays: natively where forwards are watched natively, which takes a few us less per operator.

The extension runs a graph as steps over registers: the inputs, then one for each node.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from revfx.engine.native import native_library
from revfx.passes._torch import is_overload


CONSTANT, REGISTER, LIST = range(3)  # kinds of operands
Run = Callable[[list[Any]], tuple[Any, ...]]


def item(results: Any, position: int) -> Any:
    """Return one of the results of an operator."""
    return results[position]


def runner(graph: fx.Graph, kinds: Sequence[str]) -> Run:
    """Return a graph as a function of a list of inputs, which it empties; `kinds` as in `Replay.inputs`."""
    library = native_library()
    return python_runner(graph) if library is None else _native_runner(library, graph, kinds)


def python_runner(graph: fx.Graph) -> Run:
    """Return a graph as a function in Python. `fx.GraphModule` would note its source for the life of the process."""
    code = graph.python_code("self")
    names = dict(code.globals)
    exec(compile(code.src, "<replay>", "exec"), names)
    return functools.partial(names["forward"], None)


def _native_runner(library: Any, graph: fx.Graph, kinds: Sequence[str]) -> Run:
    registers = {node: i for i, node in enumerate(n for n in graph.nodes if n.op != "output")}
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        last.update(dict.fromkeys((node, *node.all_input_nodes), node))
    replay = library.Replay(len(registers), [kind == "slot" for kind in kinds])
    for node in graph.nodes:
        if node.op == "placeholder":
            continue
        if node.op == "output":
            replay.returns([registers[n] for n in node.args[0]])
            continue
        freed = [registers[n] for n in dict.fromkeys((node, *node.all_input_nodes)) if last[n] is node]
        if is_overload(node.target):
            schema: Any = node.target._schema
            operands = [_argument_operand(node, position, a, registers) for position, a in enumerate(schema.arguments)]
            replay.add_operator(schema.name, schema.overload_name, operands, registers[node], freed)
        elif node.target is item:
            replay.add_item(registers[node.args[0]], node.args[1], registers[node], freed)
        else:
            operands = [_operand(a, registers) for a in (*node.args, *node.kwargs.values())]
            replay.add_function(_by_position(node.target, [*node.kwargs]), operands, registers[node], freed)
    return replay.run


def _by_position(function: Callable[..., Any], names: Sequence[str]) -> Callable[..., Any]:
    """Return a function that takes the arguments of these names last."""
    if not names:
        return function

    def call(*args: Any) -> Any:
        first, rest = args[: -len(names)], args[-len(names) :]
        return function(*first, **dict(zip(names, rest, strict=True)))

    return call


def _argument_operand(node: fx.Node, position: int, argument: Any, registers: dict[fx.Node, int]) -> Any:
    """Return the operand for one argument of an operator; None for its default."""
    if argument.name in node.kwargs:
        return _operand(node.kwargs[argument.name], registers)
    if argument.kwarg_only or position >= len(node.args):
        return None
    return _operand(node.args[position], registers)


def _operand(a: Any, registers: dict[fx.Node, int]) -> tuple[int, Any]:
    if isinstance(a, fx.Node):
        return REGISTER, registers[a]
    if isinstance(a, (list, tuple)) and any(isinstance(x, fx.Node) for x in a):
        return LIST, [_operand(x, registers) for x in a]
    return CONSTANT, list(a) if isinstance(a, list) else a
