"""What a recording gives: a graph, and where its inputs and results belong."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from revfx import _torch
from revfx.capture.guards import AttributeReads


Spot = tuple[str, str]  # where a tensor hangs: the path of a module, and a name


@dataclass(frozen=True)
class Capture:
    """A recorded forward: the graph, where its inputs come from, and how its result is put together.

    `inputs` are positions among the flattened arguments; `outputs` holds nodes, constants and objects to be made anew,
    `spec` their structure.
    `attributes` says where each get_attr node's tensor hangs: (module path, name). `tied` are pairs of such places that
    held one tensor, which the graph reads from the first of them only. `reads` are the attributes that the code read,
    `written` those that modules called whole set.
    """

    graph: fx.Graph
    inputs: tuple[int, ...]
    outputs: tuple[Any, ...]
    spec: pytree.TreeSpec
    attributes: dict[fx.Node, Spot]
    opened: frozenset[str]
    tied: tuple[tuple[Spot, Spot], ...] = ()
    written: frozenset[tuple[type, str]] = frozenset()
    reads: AttributeReads = field(default_factory=AttributeReads)


def where_held(root: nn.Module) -> tuple[dict[int, tuple[Tensor, str, str]], list[tuple[Spot, Spot]]]:
    """Return the tensors of a model's modules, by address, with the first place where each hangs; and the pairs of
    places that hold the same one.
    """
    found: dict[int, tuple[Tensor, str, str]] = {}
    tied: list[tuple[Spot, Spot]] = []
    for path, module in root.named_modules(remove_duplicate=True):
        own = {k: v for k, v in vars(module).items() if isinstance(v, Tensor)}
        for name, t in {**_torch.parameters(module), **_torch.buffers(module), **own}.items():
            if t is not None:
                first = found.setdefault(id(t), (t, path, name))[1:]
                tied += [((path, name), first)] if first != (path, name) else []
    return found, tied
