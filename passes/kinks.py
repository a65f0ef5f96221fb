"""Which values a rounding inverse must not give back, since an operation tells the numbers that they hold from others.

Zeros are counted (see `revfx.passes.atoms`), or, in compiled graphs, kept where something sees them. But a stream that
starts as whole numbers, and to which dropout adds nothing in places, holds these numbers there, and `floor(1 - 1e-16)`
is 0. So it is followed upwards where operations jump or bend: only at zero, as relu, or elsewhere, as floor, hardtanh
and `>= 1`; and downwards which numbers a value takes with positive probability. A sum of two such values may come as
near to zero as rounding (0.1 + 0.2 - 0.3 is 6e-17), which relu tells from zero; so may what a normalisation makes of
constant rows.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, fx

from revfx.passes import names
from revfx.passes.atoms import CERTAIN, NONE, PERHAPS, RARE, may_be_continuous
from revfx.passes.bounds import Interval, bounds
from revfx.passes.facts import GENERIC
from revfx.passes.moved import Moved, elsewhere
from revfx.passes.ties import NO_TIE, Tie
from revfx.rules import op_name


# The numbers that a value takes with positive probability: zero at most; those of parameters, which are repeated but
# have no pattern (`is_generic`); any; and sums of any with any.
ZERO, OWN, ANY, SUM, NEVER = range(5)
# Where whole rows of zeros are reckoned with, which stay zeros when mixed: nowhere, in sums of any with any, also in
# what a normalisation makes of groups that hold one number.
NO_ROWS, OF_SUMS, OF_NORMS = range(3)

MASKS_AND_SEEDS = names.COMPARED | names.SIGNS | names.NOWHERE | names.ATTENTION
MIXERS = names.MIXERS - names.NORMS - names.DRAWN - names.SCALES - names.ATTENTION
ONE_ADDED = frozenset("addmm addmv addbmm baddbmm".split())  # the first operand, to the product of the others
TWO_MIXED = frozenset(n for n in MIXERS if n.startswith("conv") or n == "linear")  # and a third one added
CERTAIN_ZEROS = "it can hold exact zeros, which a rounding inverse would return as +-1e-17"
MAKE_NONE = names.SMOOTH | names.MIXERS | names.PICKS | names.JOINS | names.NORMS | names.TURNS | names.NOWHERE
SMOOTH = (MAKE_NONE | names.MOVES_NUMBERS | names.ADDS_UP) - names.AT_ZERO - names.SIGNS - names.ELSEWHERE
# Of values that equal each other in places these make none that holds a number there, or it is known by `cancels`.
PLAIN = names.JOINS | names.CHOICES | names.SUMS | frozenset(n for n in names.PRODUCTS if "div" not in n)
SUMS = names.SUMS | names.SUMS_WITH_PRODUCT
EVEN = SMOOTH | SUMS | names.PRODUCTS
KNOWN = EVEN | names.MAKERS | names.AT_ZERO | names.SIGNS


@dataclass(frozen=True, slots=True)
class Inside:
    """Of a call looked into: the lowest kind of operand that it tells apart, and the kind of what it gives."""

    bends: int = ANY
    gives: tuple[int, ...] = (SUM,) * NEVER


@dataclass(frozen=True, slots=True)
class Made:
    """A value `name(*operands)`, with the levels of atoms of both; `numbers` are those among the other arguments.

    `rounds`: whole numbers, made of others. `away`: of an operand that stays away from zero. `inside`: for a call that
    is looked into elsewhere, what it is like. `tie`: whether operands equal each other in places.
    """

    key: Hashable
    name: str
    level: int
    operands: tuple[Hashable, ...]
    levels: tuple[int, ...]
    numbers: tuple[float, ...] = ()
    rounds: bool = False
    away: bool = False
    inside: Inside | None = None
    tie: Tie = NO_TIE

    @property
    def bare(self) -> str:
        """The name, of an operation in place too."""
        return names.bare(self.name)

    @property
    def cancels(self) -> bool:
        """Whether it is a sum that may be zero as parts of it cancel, whatever numbers its operands hold."""
        vanishes = self.tie.vanishes or self.level > min((PERHAPS, *self.levels))
        return vanishes and self.bare in SUMS and len(self.operands) > 1


@dataclass(frozen=True, slots=True)
class Apart:
    """Why a value is told apart from what an inverse returns; `tied`: whatever its numbers, as others equal them."""

    text: str
    tied: bool


Told = tuple[int, Made | None]  # the lowest kind at which numbers are told apart, and what does it


def kinks(
    made: Sequence[Made],
    own: Container[Hashable] = (),
    rows: int = OF_NORMS,
    given: int = ANY,
    moves: Sequence[Moved] = (),
) -> tuple[dict[Hashable, int], dict[Hashable, Told]]:
    """Return, by key, the kind of each value that is made, in order, and for each operand what tells its numbers apart.

    `own` are generic parameters. What they mix has no numbers, and normalised values have none, but for `rows`.
    Operands from elsewhere are `given`. What tells a value apart tells those apart from which it is put together again,
    as `moves` says.
    """
    kinds, steps, gone = dict[Hashable, int](), list[tuple[Made, int, list[int]]](), set[Hashable]()
    for m in made:
        operands = [kinds.get(k, OWN if k in own else given) for k in m.operands]
        scaled = m.bare in names.PRODUCTS and not gone.isdisjoint(m.operands[: 1 if "div" in m.bare else None])
        kinds[m.key] = kind = SUM if scaled else _kind(m, operands, rows)
        moved = m.bare in names.SUMS and len(m.operands) == 1 and m.operands[0] in gone  # by a number
        if scaled or moved or m.cancels or _makes_of_ties(m):
            gone.add(m.key)  # what is zero as parts cancel, whatever it is multiplied by
        steps.append((m, kind, operands))
    told: dict[Hashable, dict[Hashable, Told]] = {}  # by reader
    for m, kind, operands in reversed(steps):
        above = _least(told.get(m.key, {}).values())
        own_told, culprit = above if kind > OWN else (NEVER, None)
        bends = ZERO if _sees_ties(m) and _bends(m) < NEVER else _bends(m)
        for i, k in enumerate(m.operands):
            through = ANY if own_told < NEVER and _shifts(m, operands[:i] + operands[i + 1 :]) else own_told
            through = ZERO if own_told < NEVER and (m.cancels or _makes_of_ties(m)) else through
            carried = ZERO if above[0] == ZERO and k in m.tie.carried else NEVER
            least = _least([(through, culprit), (carried, above[1]), (bends, m)])
            if least[0] < NEVER:
                by = told.setdefault(k, {})
                by[m.key] = _least([by.get(m.key, least), least])
    found = {k: _least(by.values()) for k, by in told.items()}
    for k, t in elsewhere(moves, told):
        found[k] = _least([found.get(k, t), t])
    return kinds, found


def _least(told: Iterable[Told]) -> Told:
    return min(told, key=itemgetter(0), default=(NEVER, None))


def _kind(m: Made, operands: list[int], rows: int) -> int:
    most = max(
        operands, default=ZERO if m.bare in names.ZEROS or (m.bare in names.FILLS and not any(m.numbers)) else ANY
    )
    if _makes_of_ties(m) and not (m.bare in MIXERS and OWN in operands):
        return SUM
    if m.bare in names.DRAWN or (m.level == NONE and most == ZERO and not m.cancels):
        return ZERO
    if m.bare in MIXERS:
        factors = operands[1:] if m.bare in ONE_ADDED else operands[:2] if m.bare in TWO_MIXED else operands
        several, worst = len(factors) > 1, max(factors, default=ANY)
        return ZERO if several and min(factors) <= OWN and (worst < SUM or rows < OF_SUMS) else _added(worst)
    if m.inside is not None:
        return m.inside.gives[most]
    if m.rounds:
        return max(ANY, most)
    if m.bare in SUMS:
        if len(operands) > 1 and NONE in m.levels and ZERO in operands and not m.cancels:  # random numbers
            return ZERO
        if len(operands) == 1 and m.level <= RARE and most == ZERO:  # all zero, if at all
            return ZERO
        several = sum(k > OWN for k in operands) > 1 or (len(operands) == 1 and most > OWN)
        return SUM if m.cancels or several else max(most, ANY if len(operands) == 1 and most != OWN else ZERO)
    if m.bare in names.PRODUCTS:
        least = min(operands, default=ANY)
        return least if least <= OWN else most
    if m.bare in names.NORMS:
        first = operands[0] if operands else ANY
        return _added(first) if rows >= (OF_SUMS if first == SUM else OF_NORMS) else ZERO
    if m.bare in names.REPEATS and most == ZERO:
        return OWN
    if m.bare in names.ADDS_UP or m.bare in names.MOVES_NUMBERS:
        return _added(most) if most > ZERO or m.bare in names.ADDS_UP else ANY
    if m.bare in SMOOTH or m.bare in names.AT_ZERO:
        return max(most, ANY if any(m.numbers) and m.bare in names.FILLS else ZERO)
    return max(most, ANY if m.bare in KNOWN else SUM)


def _added(kind: int) -> int:
    """Return the kind of a sum of several numbers of a value."""
    return SUM if kind > OWN else kind


def _shifts(m: Made, others: list[int]) -> bool:
    """Return whether zero is elsewhere in an operand than in the result."""
    if m.inside is None and m.bare in SUMS:
        return not others or max(others) > ZERO
    moves = names.MOVES_NUMBERS | names.ADDS_UP | names.NORMS | MIXERS
    return m.inside is not None or m.bare in moves or m.bare not in KNOWN


def _sees_ties(m: Made) -> bool:
    """Return whether it brings elements together that equal each other in places."""
    across = m.bare in names.ADDS_UP or m.bare in MIXERS or (_bends(m) < NEVER and m.bare not in names.SINGLY)
    return m.tie.meets or (m.tie.within and across)


def _makes_of_ties(m: Made) -> bool:
    """Return whether the result holds numbers, such as zero or one, where elements equal each other."""
    return _sees_ties(m) and m.bare not in PLAIN


def _bends(m: Made) -> int:
    """Return the lowest kind of an operand that the operation tells apart."""
    if m.inside is not None:
        return m.inside.bends
    if m.rounds:
        return ANY
    if m.bare in EVEN or "backward" in m.bare or (m.away and m.bare in names.AT_ZERO):  # a backward: as its forward
        return NEVER
    with_zero = m.bare in names.COMPARED and len(m.operands) == 1 and m.numbers and not any(m.numbers)
    return SUM if with_zero or m.bare in names.AT_ZERO | names.SIGNS else ANY


def look_inside(
    made: Sequence[Made], own: Container[Hashable], given: Collection[Hashable], result: Collection[Hashable]
) -> tuple[Inside, ...]:
    """Return what a call is like that makes `made` of `given`, by where rows of zeros are reckoned with."""

    def seen(rows: int) -> Inside:
        found = [(kind, *kinks(made, own, rows, kind)) for kind in range(NEVER)]
        bends = (kind for kind, _, told in found if any(told.get(k, (NEVER,))[0] <= kind for k in given))
        gives = (max((kinds.get(k, kind) for k in result), default=ANY) for kind, kinds, _ in found)
        return Inside(next(bends, NEVER), tuple(gives))

    return tuple(map(seen, (NO_ROWS, OF_SUMS, OF_NORMS)))


def made_by(
    key: Hashable, name: str, level: int, operands: Iterable[tuple[Hashable, Any, int]], args: Any, result: Any
) -> Made:
    """Return the record of the call `name(*args[0], **args[1])`, whose tensors are `operands`: key, value, level."""
    read = [(k, n) for k, t, n in operands if may_be_continuous(t) and names.bare(name) not in names.SHAPED]
    given = (*args[0], *args[1].values())
    numbers = tuple(float(x) for x in given if isinstance(x, (int, float)) and not isinstance(x, bool))
    rounds = args[1].get("rounding_mode") is not None or (
        bool(read) and not may_be_continuous(result) and _giver(name, args[0]) not in MASKS_AND_SEEDS
    )
    return Made(key, name, level, tuple(k for k, _ in read), tuple(n for _, n in read), numbers, rounds)


def name_alone(name: str, number: Any) -> str:
    """Return the name of the operation that gives one of several results alone; the same one where there is none."""
    return "mean" if name in ("var_mean", "std_mean") and number == 1 else name


def _giver(name: str, args: Sequence[Any]) -> str:
    """Return the name of the operation that made a value; of one out of several results, that of what gave them all."""
    source = args[0] if name == "getitem" else None
    return op_name(source.target) if isinstance(source, fx.Node) and source.op == "call_function" else name


def told_apart(
    graph: fx.Graph, levels: Mapping[fx.Node, int], moves: Sequence[Moved], rows: int = OF_NORMS
) -> dict[fx.Node, Apart]:
    """Return why no rounding inverse may give back nodes that hold numbers which something tells from others near to
    them.

    `levels` says which have atoms, `moves` what is put together of what. A call of a module says in `meta` what it is
    like `inside`, by each of `rows`.
    """
    return _told(_made(graph, levels, rows), frozenset(generic(graph)), moves, rows)


def numberless(graph: fx.Graph, levels: Mapping[fx.Node, int]) -> frozenset[fx.Node]:
    """Return the nodes that hold no number but zero with positive probability, given that parameters are generic."""
    found, _ = kinks(_made(graph, levels, NO_ROWS), frozenset(generic(graph)), NO_ROWS)
    return frozenset(n for n, kind in found.items() if kind == ZERO and isinstance(n, fx.Node))


def generic(graph: fx.Graph) -> list[fx.Node]:
    """Return the parameters of a graph whose numbers follow no pattern."""
    return [n for n in graph.nodes if GENERIC in n.meta.get("facts", ())]


def barred(graph: fx.Graph, levels: Mapping[fx.Node, int], moves: Sequence[Moved]) -> dict[fx.Node, str]:
    """Return why a rounding inverse may not give nodes back, where nobody can look at their numbers first.

    Made of exact zeros, or told apart; what is zero by chance alone (RARE) counts as if it never were.
    """
    seldom = {n: NONE if level == RARE else level for n, level in levels.items()}
    made, own = _made(graph, seldom, OF_NORMS), frozenset(generic(graph))
    zeros = {n: by for n, by in _zeros_told(made, moves).items() if levels[n] == PERHAPS}
    told = {**{n: _reason(by) for n, by in zeros.items()}, **{n: a.text for n, a in _told(made, own, moves).items()}}
    return {**told, **{n: CERTAIN_ZEROS for n, level in levels.items() if level == CERTAIN}}


def _zeros_told(made: Sequence[Made], moves: Sequence[Moved]) -> dict[fx.Node, Made]:
    """Return what tells zeros of nodes from tiny numbers, in themselves or in what has zeros since they have some."""
    told: dict[Hashable, dict[Hashable, Told]] = {}  # by reader
    for m in reversed(made):
        by = m if _bends(m) < NEVER else next((by for _, by in told.get(m.key, {}).values()), None)
        if by is not None and (by is m or m.level >= PERHAPS):
            for k in m.operands:
                told.setdefault(k, {})[m.key] = (ZERO, by)
    found = {k: by for k, theirs in told.items() for _, by in theirs.values()}
    found.update((k, by) for k, (_, by) in elsewhere(moves, told))
    return {k: by for k, by in found.items() if by is not None and isinstance(k, fx.Node)}


def _made(graph: fx.Graph, levels: Mapping[fx.Node, int], rows: int) -> list[Made]:
    made, between = list[Made](), bounds(graph)
    for node in graph.nodes:
        if node.op not in ("call_function", "call_method", "call_module"):
            continue
        call, name = _call_of(node)
        operands = [(n, n.meta.get("val"), levels[n]) for n in call.all_input_nodes]
        if node.op == "call_module" or node.meta.get("opaque", False):
            read = [(n, level) for n, val, level in operands if may_be_continuous(val)]
            keys, theirs = tuple(n for n, _ in read), tuple(level for _, level in read)
            inside = node.meta.get("inside", (Inside(),) * 3)[rows]
            made.append(Made(node, str(node.target), levels[node], keys, theirs, inside=inside, tie=node.meta["tie"]))
        else:
            args, result = (call.args, call.kwargs), node.meta.get("val")
            one = made_by(node, name, levels[node], operands, args, result)
            away = all(_stays_away(n.meta.get("val"), between[n]) for n in one.operands if isinstance(n, fx.Node))
            made.append(replace(one, tie=call.meta["tie"], away=away))
    return made


def _call_of(node: fx.Node) -> tuple[fx.Node, str]:
    """Return the call that a node stands for, and its name: of what gives a mean among others, that of a mean."""
    source, name = node.args[0] if node.args else None, op_name(node.target)
    if name == "getitem" and isinstance(source, fx.Node):
        giver = _giver(name, node.args)
        alone = name_alone(giver, node.args[1])
        if alone != giver:
            return source, alone
    return node, name


def _stays_away(val: Any, between: Interval) -> bool:
    """Return whether a value is so far from zero that rounding changes its root little: by a norm's epsilon, say."""
    return isinstance(val, Tensor) and between.least >= torch.finfo(val.dtype).eps


def _told(
    made: Sequence[Made], own: Collection[fx.Node], moves: Sequence[Moved], rows: int = OF_NORMS
) -> dict[fx.Node, Apart]:
    kinds, told = kinks(made, own, rows, moves=moves)
    return {
        n: Apart(_reason(by), kind == ZERO)
        for n, (kind, by) in told.items()
        if by and isinstance(n, fx.Node) and kinds.get(n, OWN if n in own else ANY) >= kind
    }


def _reason(by: Made) -> str:
    where = by.key.meta.get("where") if isinstance(by.key, fx.Node) else None
    owner = getattr(by.key.target, "__self__", None) if isinstance(by.key, fx.Node) else None
    name = owner.__name__ if isinstance(owner, type) else by.name  # an autograd function's `apply`
    return f"`{name}`{f' ({where})' if where else ''} may tell its numbers from those that an inverse returns"
