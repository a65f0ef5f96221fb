"""The choices for a range of blocks, from keeping everything to nothing: minimum cuts, one for each price of time.

With P the price of a second in bytes, the cheapest choice is a minimum cut (as in torch's partitioner, but with
times): a node on the side of the sink is there in the backward; an operator there runs again, for P times its
seconds; a value there is kept, for its bytes, if its operator is on the other side. A saved value on the side of the
source is stored as bits, for their bytes and time. Nodes that are on one side in any cut are one node.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any

import networkx as nx
from networkx.algorithms.flow import boykov_kolmogorov, build_residual_network

from revfx.fit.costs import BIT_COST, Cost
from revfx.fit.needs import Needs
from revfx.fit.simulate import BITS, OVERHEAD, Model


PRICES = 10  # how many are tried, besides the following ones
SIZED = 5e8, 1e9, 2e9, 4e9  # bytes per second, where seconds are estimated from sizes
EVERYTHING = 1e18  # a price at which all is kept
FEW = 4  # nodes: all cuts are compared of parts of the network with no more

Edge = tuple[Any, Any]
Edges = Mapping[Edge, tuple[float | None, float]]  # by edge the price of a cut: bytes, and seconds
Side = tuple[frozenset[Any], list[Edge]]  # nodes on the side of the sink, and the edges that are cut for them


@dataclass(frozen=True)
class Choice:
    """The results of some operators that are kept: whole values, saved tensors as bits, dropout masks as bits."""

    kept: frozenset[int]
    compressed: frozenset[int]
    dropout_masks: frozenset[int]

    def renamed(self, values: Mapping[int, int], saved: Mapping[int, int]) -> Choice:
        """Return it with other numbers, without the values that have none."""
        names = ((self.kept, values), (self.compressed, saved), (self.dropout_masks, values))
        return Choice(*[frozenset([new[x] for x in old if x in new]) for old, new in names])


class Menu:
    """The choices for some operators; `given` values are kept in any case."""

    def __init__(self, model: Model, ops: range, given: frozenset[int]) -> None:
        self.model: Model = model
        self.needs: Needs = model.needs
        self.costs: Sequence[Cost] = model.costs
        self.ops: range = ops
        self.given: frozenset[int] = given
        self.values: dict[int, int] = {v: o for o in self.ops for v in self.needs.tape.ops[o].makes}
        self.undecided: set[int] = self.values.keys() - given
        self.dropout_masks: set[int] = {v for v in self.values if self.needs.dropout_masks.get(v) in self.values}

    def choices(self) -> dict[Choice, bool]:
        """Return the different choices, each with whether it is independent of measured times; those come first."""
        found = dict.fromkeys(self._choices((0.0, *SIZED, EVERYTHING), self._sized), True)
        for choice in self._choices(self._prices(), self.measured_edges):
            found.setdefault(choice, False)
        return found

    def _choices(self, prices: Sequence[float], edges: Edges) -> list[Choice]:
        """Return the choices at rising prices: where two prices have the same one, so have those between."""
        found: dict[int, Choice] = {}
        todo = [(0, len(prices) - 1)] if prices else []
        while todo:
            low, high = todo.pop()
            for n in (low, high):
                if n not in found:
                    found[n] = self.choice(prices[n], edges)
            if high - low > 1 and found[low] != found[high]:
                middle = (low + high) // 2
                todo += [(low, middle), (middle, high)]
        return [found[n] for n in sorted(found)]

    def _prices(self) -> list[float]:
        """Return prices at which running an operator again costs as much as keeping its results."""
        tape = self.needs.tape
        ratios = sorted(
            sum(map(tape.size, tape.ops[o].makes)) / (self.costs[o].seconds + OVERHEAD)
            for o in self.ops
            if self.needs.replayed[o] is not None
        )
        n = min(len(ratios), PRICES)
        return [ratios[i * (len(ratios) - 1) // max(1, n - 1)] * (1 + 1e-6) for i in range(n)]

    @cached_property
    def smallest(self) -> Choice:
        """The choice that keeps the fewest bytes."""
        return self.choice(0.0, self._sized)

    def choice(self, price: float, edges: Edges) -> Choice:
        """Return the cheapest choice at a price of time, in bytes a second."""
        finite = {edge: int(size + price * seconds) for edge, (size, seconds) in edges.items() if size is not None}
        infinite = 3 * sum(finite.values()) + 1
        sink_side: set[Any] = {"T"}  # and the nodes from which capacity is left to the sink
        small, large = self._parts
        for sides in small:
            sink_side |= min(sides, key=lambda side: sum([finite[edge] for edge in side[1]]))[0]
        for network, inside in large:
            network.graph["inf"] = infinite
            for a, b in inside:
                network[a][b]["capacity"] = finite.get((a, b), infinite)
            boykov_kolmogorov(network, "S", "T", residual=network, value_only=True)
            sink_side.update(network.graph["trees"][1])
        there = {v for v in self.undecided if self._node(v) in sink_side}
        dropout_masks = self.dropout_masks & there
        kept = {v for v in there if self._operator_nodes.get(self.values[v]) not in sink_side} - dropout_masks
        compressed = {k for v in self.undecided - there for k in self.needs.keepable.get(v, ())}
        return Choice(frozenset(kept), frozenset(compressed), frozenset(dropout_masks))

    @cached_property
    def _parts(self) -> tuple[list[list[Side]], list[tuple[Any, list[Edge]]]]:
        """Return the parts of the network that share only source and sink, so that each is cut for itself.

        Of small parts, return all cuts without an infinite edge, of larger ones the residual network and the edges.
        """
        graph = nx.Graph()
        for a, b in self._sized:
            graph.add_nodes_from({a, b} - {"S", "T"})
            if a != "S" and b != "T":
                graph.add_edge(a, b)
        parts: list[set[Any]] = list(nx.connected_components(graph))
        part_of: dict[Any, int] = {}
        for n, nodes in enumerate(parts):
            part_of.update(dict.fromkeys(nodes, n))
        edges: list[list[Edge]] = [[] for _ in parts]
        for a, b in self._sized:
            edges[part_of[b if a == "S" else a]].append((a, b))
        small: list[list[Side]] = []
        large: list[tuple[Any, list[Edge]]] = []
        for nodes, inside in zip(parts, edges, strict=True):
            if len(nodes) <= FEW:
                small.append([*self._sides(nodes, inside)])
            else:
                part = nx.DiGraph()
                part.add_nodes_from(("S", "T"))
                part.add_edges_from((*edge, {"capacity": 1}) for edge in inside)
                large.append((build_residual_network(part, "capacity"), inside))
        return small, large

    def _sides(self, nodes: Collection[Any], edges: Sequence[Edge]) -> Iterator[Side]:
        """Yield the sides of the sink, the smallest first, with the edges that lead there from the other side."""
        for n in range(len(nodes) + 1):
            for side in combinations(nodes, n):
                there = {*side, "T"}
                cut = [(a, b) for a, b in edges if (a in there) < (b in there)]
                if all(self._sized[edge][0] is not None for edge in cut):
                    yield frozenset(side), cut

    @cached_property
    def _sized(self) -> Edges:
        """The edges with seconds that follow from the sizes of operands and results."""
        return self._edges(self.model.estimates, BIT_COST)

    @cached_property
    def measured_edges(self) -> Edges:
        """The edges with measured seconds."""
        return self._edges([c.seconds for c in self.costs], self.model.bit)

    def _edges(self, seconds_of: Sequence[float], bit: float) -> Edges:
        """Return the edges with the price of a cut: bytes (None: it can't be cut) and seconds.

        Args:
            seconds_of: by operator.
            bit: seconds an element that a bit in its place takes.
        """
        found: dict[tuple[Any, Any], tuple[float | None, float]] = {}

        def add(a: Any, b: Any, size: float | None, seconds: float = 0.0) -> None:
            if a != b and (a, b) != ("S", "T") and a != "T":  # edges that no cut can save, or none cuts
                known, known_seconds = found.get((a, b), (0.0, 0.0))
                found[a, b] = None if size is None or known is None else known + size, known_seconds + seconds

        for o, node in self._operator_nodes.items():
            add("S", node, 0.0, seconds_of[o] + OVERHEAD)
            for r in self._read_by(o):
                add(self._node(r), node, None)
        for v in self.undecided:
            o, node = self.values[v], self._node(v)
            if v in self.dropout_masks:
                add("S", node, -(-self.needs.elements(v) // BITS), OVERHEAD + bit * self.needs.elements(v))
            else:
                add(self._operator_nodes.get(o, "S"), node, self._worth(v))
            if node != "T" and (saved := self.needs.keepable.get(v, ())):
                elements = len(saved) * self.needs.elements(v)
                add(node, "T", elements / BITS, elements * bit)
        return found

    def _read_by(self, operator: int) -> set[int]:
        """Return the values that an operator that runs again takes from others that may."""
        return self.undecided.intersection(self.needs.operands[operator])

    @cached_property
    def _operator_nodes(self) -> dict[int, Any]:
        """Return the nodes of operators that may run again.

        One whose results can't be kept, and are read by one other, shares the node of that.
        """
        found: dict[int, Any] = {}
        readers: dict[int, set[Any]] = {}  # by value, the nodes of its readers
        for o in reversed(self.ops):
            if self.needs.replayed[o] is None:
                continue
            found[o] = node = "operator", o
            results = self.needs.tape.ops[o].makes
            if not any(v in self.needs.keepable or v in self.dropout_masks for v in results):
                following = set[Any]().union(*(readers.get(v, ()) for v in results))
                if len(following) == 1:
                    found[o] = node = following.pop()
            for r in self._read_by(o):
                readers.setdefault(r, set()).add(node)
        return found

    def _node(self, value: int) -> Any:
        """Return the node of a value: the sink, if the backward needs all of it; its operator, if it can't be kept."""
        saved = self.needs.keepable.get(value)
        if saved and not self.needs.compressed >= set(saved):
            return "T"
        if saved is None and value not in self.dropout_masks:
            return self._operator_nodes.get(self.values[value], value)
        return value

    def _worth(self, value: int) -> float | None:
        """Return the bytes to keep a value: 0 if its allocation stays anyway; None if the value can't be kept."""
        if value not in self.needs.keepable:
            return None
        allocation = self.needs.tape.allocation(value)
        return 0.0 if self.model.end(allocation) is None else allocation.size
