"""The choices for a range of blocks, from keeping everything to nothing: minimum cuts, one for each price of time.

With P the price of a second in bytes, the cheapest choice is a minimum cut (as in torch's partitioner, but with
times): a node on the side of the sink is there in the backward; an operator there runs again, for P times its
seconds; a value there is kept, for its bytes, if its operator is on the other side. A saved value on the side of the
source is stored as bits, for their bytes and time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import networkx as nx
from networkx.algorithms.flow import boykov_kolmogorov, build_residual_network

from revfx.fit.costs import BIT_COST, Cost
from revfx.fit.needs import Needs
from revfx.fit.simulate import BITS, OVERHEAD, Model


PRICES = 10  # how many are tried, besides the following ones
SIZED = 5e8, 1e9, 2e9, 4e9  # bytes per second, where seconds are estimated from sizes
EVERYTHING = 1e18  # a price at which all is kept

Edges = Mapping[tuple[Any, Any], tuple[float | None, float]]  # by edge the price of a cut: bytes, and seconds


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
        self.dropout_masks: set[int] = {v for v in self.values if self.needs.dropout_masks.get(v) in self.values}

    def choices(self) -> dict[Choice, bool]:
        """Return the different choices, each with whether it is independent of measured times; those come first."""
        found = dict.fromkeys(self._choices((0.0, *SIZED, EVERYTHING), self._sized), True)
        for choice in self._choices(self._prices(), self._measured):
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
        network = self._network
        finite = {edge: int(size + price * seconds) for edge, (size, seconds) in edges.items() if size is not None}
        infinite = network.graph["inf"] = 3 * sum(finite.values()) + 1
        for a, b in edges:
            network[a][b]["capacity"] = finite.get((a, b), infinite)
        boykov_kolmogorov(network, "S", "T", residual=network, value_only=True)
        there = network.graph["trees"][1].keys()  # the nodes from which capacity is left to the sink
        dropout_masks = self.dropout_masks & there
        kept = {v for v, o in self.values.items() if v in there and ("operator", o) not in there} - dropout_masks
        gone = self.values.keys() - there - self.given
        compressed = {k for v in gone for k in self.needs.keepable.get(v, ())}
        return Choice(frozenset(kept), frozenset(compressed), frozenset(dropout_masks))

    @cached_property
    def _network(self) -> Any:
        """Return the residual network of the edges, which all prices use."""
        graph = nx.DiGraph()
        graph.add_nodes_from(("S", "T"))
        graph.add_edges_from((*edge, {"capacity": 1}) for edge in self._sized)
        return build_residual_network(graph, "capacity")

    @cached_property
    def _sized(self) -> Edges:
        """The edges with seconds that follow from the sizes of operands and results."""
        return self._edges(self.model.estimates, BIT_COST)

    @cached_property
    def _measured(self) -> Edges:
        return self._edges([c.seconds for c in self.costs], self.model.bit)

    def _edges(self, seconds_of: Sequence[float], bit: float) -> Edges:
        """Return the edges with the price of a cut: bytes (None: it can't be cut) and seconds.

        Args:
            seconds_of: by operator.
            bit: seconds an element that a bit in its place takes.
        """
        found: dict[tuple[Any, Any], tuple[float | None, float]] = {}
        for v, o in self.values.items():
            if v in self.given:
                continue
            op, maker = self.needs.replayed[o], ("operator", o)
            if v in self.dropout_masks:
                found["S", v] = -(-self.needs.elements(v) // BITS), OVERHEAD + bit * self.needs.elements(v)
            elif op is None:
                found["S", v] = self._worth(v), 0.0
            else:
                found["S", maker] = 0.0, seconds_of[o] + OVERHEAD
                found[maker, v] = self._worth(v), 0.0
                for r in {s.value for s in op.reads} & self.values.keys() - self.given:
                    found[r, maker] = None, 0.0
            saved = self.needs.keepable.get(v, ())
            if saved and self.needs.compressed >= set(saved):
                elements = len(saved) * self.needs.elements(v)
                found[v, "T"] = elements / BITS, elements * bit
            elif saved:
                found[v, "T"] = None, 0.0
        return found

    def _worth(self, value: int) -> float | None:
        """Return the bytes to keep a value: 0 if its allocation stays anyway; None if the value can't be kept."""
        if value not in self.needs.keepable:
            return None
        allocation = self.needs.tape.allocation(value)
        return 0.0 if self.model.end(allocation) is None else allocation.size
