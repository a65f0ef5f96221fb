"""Effects of aten operations on the numbers that they take: one table, and its consequences for a compiled graph.

There an activation comes back up to rounding. A number that is as good as any other may be off by that; an exact zero
(out of relu, dropout, a mask, padding) that comes back as 1e-17 makes relu's gradient pass, and 1 - 1e-16 is below
`floor`'s step. So it is followed downwards which values take some number with positive probability, an *atom*, and
upwards where operations jump or bend: a value that has atoms there may not come back by an inverse that rounds. Random
numbers, what a weight mixes, and what such a value is added to have none. What the table does not tell is kept.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum, IntFlag
from typing import Any

from torch import Tensor, fx

from revfx.passes import _torch
from revfx.passes.moves import directions_of, taken_apart
from revfx.passes.sizes import fixed, same
from revfx.rules import Tile, op_name
from revfx.rules.layout import joined


class Atoms(IntEnum):
    """Which numbers a value takes with positive probability: none, zero at most, any."""

    NONE, ZERO, ANY = range(3)


class Kinks(IntFlag):
    """Where something that reads a value, or follows from it, jumps or bends: nowhere, at zero, elsewhere."""

    NONE, ZERO, ELSEWHERE, ANYWHERE = range(4)


class Kind(Enum):
    """How the numbers of a result come from those of the operands.

    MOVE: they are theirs, or given ones beside them. MAP: a function of each. SUM, PRODUCT: of one of each operand.
    MIX: sums of products of many, with weights. ADDS: sums of many. NORM: many, less their mean or over their size.
    DRAW: random. FILL: a given number.
    """

    MOVE, MAP, SUM, PRODUCT, MIX, ADDS, NORM, DRAW, FILL = range(9)


@dataclass(frozen=True, slots=True)
class Trait:
    """One operation: its `kind`, its own `kinks`, the atoms that it `makes` of other numbers, whether 0 is 0 `at_zero`.

    A FILL, and a MOVE that puts numbers beside the operand's, make the atoms that its arguments are.
    """

    kind: Kind
    kinks: Kinks = Kinks.NONE
    makes: Atoms = Atoms.NONE
    at_zero: bool = True


UNKNOWN_TRAIT = Trait(Kind.MAP, Kinks.ANYWHERE, Atoms.ANY, at_zero=False)

_ROWS: dict[Trait, str] = {
    Trait(Kind.MOVE): """cat stack flip roll clone copy index _unsafe_index gather index_select repeat slice_scatter
        select_scatter pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle getitem lift_fresh_copy
        where masked_fill masked_scatter constant_pad_nd scatter index_put _unsafe_index_put index_fill tril triu
        _unsafe_view reshape expand_copy upsample_nearest1d upsample_nearest2d upsample_nearest3d reflection_pad1d
        reflection_pad2d replication_pad1d replication_pad2d _unsafe_masked_index complex real imag
        view_as_real view_as_complex _conj inductor_force_stride_order
        wait_tensor all_gather_into_tensor all_to_all_single broadcast""",
    Trait(Kind.MOVE, Kinks.ANYWHERE): """amax amin max min topk sort median kthvalue cummax cummin
        max_pool2d_with_indices max_pool3d_with_indices _low_memory_max_pool_with_offsets adaptive_max_pool2d
        maximum minimum fmax fmin""",
    Trait(Kind.MAP): """neg sin tan tanh sinh asin atan asinh atanh gelu silu mish erf erfinv expm1 log1p _to_copy
        convert_element_type native_dropout square pow""",
    Trait(Kind.MAP, at_zero=False): """exp exp2 cos cosh acos acosh sigmoid softplus log log2 log10 log_sigmoid_forward
        lgamma digamma erfc logit atan2""",
    Trait(Kind.MAP, Kinks.ZERO): "leaky_relu _prelu_kernel elu celu abs sqrt",
    Trait(Kind.MAP, Kinks.ZERO, at_zero=False): "rsqrt reciprocal xlogy hypot",
    Trait(Kind.MAP, Kinks.ZERO, Atoms.ZERO): "relu",
    Trait(Kind.MAP, Kinks.ZERO, Atoms.ANY): "sgn sign heaviside logical_not logical_and logical_or",
    Trait(Kind.MAP, Kinks.ANYWHERE, Atoms.ANY): """clamp clamp_min clamp_max hardtanh hardswish hardsigmoid softshrink
        hardshrink threshold floor ceil round trunc frac fmod remainder floor_divide eq ne lt le gt ge isnan isinf""",
    Trait(Kind.SUM): "add sub rsub lerp addcmul addcdiv",
    Trait(Kind.PRODUCT): "mul div",
    Trait(Kind.MIX): """mm bmm addmm baddbmm addmv mv dot convolution linear matmul einsum
        _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention
        _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention
        _scaled_dot_product_fused_attention_overrideable _thnn_fused_lstm_cell _thnn_fused_gru_cell mkldnn_rnn_layer
        _cudnn_rnn lstm gru""",
    Trait(Kind.ADDS): """sum mean cumsum cumprod prod avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d
        upsample_bilinear2d upsample_linear1d upsample_bicubic2d scatter_add index_add _fft_r2c _fft_c2r _fft_c2c
        scatter_reduce trace all_reduce reduce_scatter_tensor""",
    Trait(Kind.NORM): """native_layer_norm native_group_norm _native_batch_norm_legit_functional native_batch_norm
        _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm _fused_rms_norm _softmax
        _log_softmax _safe_softmax var var_mean std std_mean logsumexp logcumsumexp""",
    Trait(Kind.NORM, Kinks.ZERO): "linalg_vector_norm norm",
    Trait(Kind.DRAW): """rand randn rand_like randn_like normal normal_functional uniform exponential inductor_random
        inductor_seeds inductor_lookup_seed embedding""",
    Trait(Kind.FILL): """full full_like zeros zeros_like ones ones_like new_zeros new_ones new_full scalar_tensor empty
        empty_like new_empty empty_strided new_empty_strided arange eye iota""",
}
TRAITS: Mapping[str, Trait] = {name: trait for trait, names in _ROWS.items() for name in names.split()}
COMPARED = frozenset("eq ne lt le gt ge clamp clamp_min clamp_max".split())
WRITES = frozenset(
    """where masked_fill constant_pad_nd scatter index_put _unsafe_index_put index_fill tril triu
    _unsafe_masked_index""".split()
)


def trait_of(node: fx.Node) -> Trait:
    """Return the traits of the operation of a node."""
    if node.target is operator.getitem:
        return TRAITS["getitem"]
    name = _torch.packet_name(node.target)
    trait = TRAITS.get(name)
    if trait is None:
        forward, backward, _ = name.partition("_backward")
        if backward:
            return _backward(node, TRAITS.get(forward))
        return Trait(Kind.MOVE) if _torch.may_alias(node.target) else UNKNOWN_TRAIT
    if name in COMPARED:
        limits = [x for x in (*node.args[1:], *node.kwargs.values()) if x is not None]
        if limits == [0]:
            return Trait(Kind.MAP, Kinks.ZERO, Atoms.ZERO)
    if name == "pow":
        by = node.args[1]
        whole = isinstance(by, (int, float)) and by > 0 and float(by).is_integer()
        return trait if whole else Trait(Kind.MAP, Kinks.ZERO, at_zero=False)
    if name in ("add", "sub", "rsub") and any(isinstance(x, (int, float)) and x for x in node.args[:2]):
        return Trait(Kind.MAP, at_zero=False)
    if name in ("mul", "div") and (rounded := node.kwargs.get("rounding_mode")) is not None:
        return Trait(Kind.MAP, Kinks.ANYWHERE, Atoms.ANY, at_zero=False) if rounded else trait
    return trait


def _backward(node: fx.Node, forward: Trait | None) -> Trait:
    """Return the trait of a function's own backward, which may read its result: relu's asks whether that is zero."""
    of_zero = _torch.packet_name(node.target) == "threshold_backward" and node.args[2] == 0
    bends = forward is not None and forward.kind is Kind.MAP
    return Trait(Kind.MAP, Kinks.ZERO if of_zero else forward.kinks if forward and bends else Kinks.NONE)


def is_continuous(value: Any) -> bool:
    """Return whether a value may have no atoms: it is a tensor of real or complex numbers."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def atoms_of(graph: fx.Graph, trained: Iterable[fx.Node]) -> dict[fx.Node, Atoms]:
    """Return the atoms of every node of a graph; `trained` weights have none, all else that comes in may have any."""
    found = dict.fromkeys(trained, Atoms.NONE)
    put: dict[fx.Node, list[tuple[fx.Node, int, int, int]]] = {}
    for node in graph.nodes:
        if node in found:
            continue
        if node.op != "call_function":
            found[node] = Atoms.ANY
            continue
        parts = [*joined(node)] if op_name(node.target) == "cat" else []
        if parts and fixed(size for *_, size in parts):
            put[node] = parts
        if not _is_read(node):
            found[node] = Atoms.ANY
        elif overlapped := _parts_of(node, put):  # a part of what was put together has the atoms of these
            found[node] = max(found[p] for p in overlapped)
        else:
            found[node] = _result_atoms(node, trait_of(node), found)
    return found


def _result_atoms(node: fx.Node, trait: Trait, found: Mapping[fx.Node, Atoms]) -> Atoms:
    name, arithmetic = op_name(node.target), trait.kind in (Kind.SUM, Kind.PRODUCT)
    operands = [n for n in node.all_input_nodes if _is_read(n) or (arithmetic and isinstance(n.meta["val"], Tensor))]
    theirs = [found[n] for n in operands]
    most, least = max(theirs, default=Atoms.NONE), min(theirs, default=Atoms.NONE)
    if trait.kind in (Kind.NORM, Kind.DRAW):
        return Atoms.NONE
    if trait.kind is Kind.FILL or (trait.kind is Kind.MOVE and name in WRITES):
        return max(most, _number_atoms(node, name))
    if trait.kind is Kind.SUM:
        whole = [n for n in operands if same(n.meta["val"].shape, node.meta["val"].shape)]
        if most == Atoms.NONE or any(found[n] == Atoms.NONE for n in whole):
            return Atoms.NONE
        return most if len(whole) == len(operands) else Atoms.ANY  # a bias moves zeros
    if trait.kind is Kind.PRODUCT:
        zero = any(isinstance(x, (int, float)) and x == 0 for x in node.args[:2])
        return Atoms.ZERO if zero else min(most, Atoms.ZERO) if least == Atoms.NONE else most
    if trait.kind is Kind.MIX:
        return Atoms.NONE if least == Atoms.NONE else Atoms.ANY
    if trait.kind is Kind.ADDS:
        return Atoms.ANY if most == Atoms.ANY else Atoms.NONE
    through = Atoms.ANY if most and not trait.at_zero else most
    dropped = Atoms.ZERO if name == "native_dropout" else Atoms.NONE
    return max(trait.makes, through, dropped) if trait.kind is Kind.MAP else most


def _number_atoms(node: fx.Node, name: str) -> Atoms:
    """Return the atoms that the numbers among a node's arguments are, and those that it fills in by itself."""
    if name in ("zeros", "zeros_like", "new_zeros", "tril", "triu", "constant_pad_nd", "_unsafe_masked_index"):
        numbers: Sequence[Any] = node.args[2:] if name in ("constant_pad_nd", "_unsafe_masked_index") else ()
    elif name in ("full", "full_like", "new_full", "scalar_tensor", "masked_fill", "where", "scatter", "index_fill"):
        numbers = [x for x in node.args if isinstance(x, (int, float))]
        if not numbers and name in ("masked_fill", "where", "scatter", "index_fill"):
            return Atoms.NONE  # a tensor is written there
    else:
        return Atoms.NONE if name in WRITES else Atoms.ANY
    return Atoms.ANY if any(isinstance(x, (int, float)) and x for x in numbers) else Atoms.ZERO


def _is_read(node: fx.Node) -> bool:
    val = node.meta.get("val")
    return is_continuous(val) or (isinstance(val, (tuple, list)) and any(map(is_continuous, val)))


def barred(graph: fx.Graph, trained: Iterable[fx.Node]) -> dict[fx.Node, str]:
    """Return why a rounding inverse may not give nodes back: a reader tells their atoms from numbers close to them."""
    atoms = atoms_of(graph, trained)
    seen: dict[fx.Node, tuple[Kinks, fx.Node]] = {}

    def note(node: fx.Node, kinks: Kinks, by: fx.Node) -> None:
        if kinks:
            before = seen.get(node)
            seen[node] = (kinks, by) if before is None else (before[0] | kinks, before[1])

    calls = [n for n in graph.nodes if n.op == "call_function"]
    for node in reversed(calls):
        trait = trait_of(node)
        above, by = seen.get(node, (Kinks.NONE, node))
        for operand in (n for n in node.all_input_nodes if _is_read(n)):
            note(operand, trait.kinks, node)
            note(operand, _through(trait, above, atoms, node, operand), by)
    for node in calls:  # elements of what is told apart lie elsewhere, too, and there come back by an inverse
        if trait_of(node).kind is Kind.MOVE:
            for operand in (n for n in node.all_input_nodes if n in seen):
                note(node, *seen[operand])
    return {n: _reason(atoms[n], by) for n, (kinks, by) in seen.items() if _meet(atoms[n], kinks)}


def _through(trait: Trait, above: Kinks, atoms: Mapping[fx.Node, Atoms], node: fx.Node, operand: fx.Node) -> Kinks:
    """Return where the kinks of later operations lie in an operand; none if the result has no atoms."""
    if not _meet(atoms[node], above) or trait.kind in (Kind.MIX, Kind.NORM, Kind.DRAW, Kind.FILL):
        return Kinks.NONE
    others = [atoms[n] for n in node.all_input_nodes if n is not operand and _is_read(n)]
    shifts = not trait.at_zero or trait.kind is Kind.ADDS or (trait.kind is Kind.SUM and max(others, default=0) > 1)
    return Kinks.ANYWHERE if shifts else above


def _meet(atoms: Atoms, kinks: Kinks) -> bool:
    return bool(kinks) and (atoms == Atoms.ANY or (atoms == Atoms.ZERO and Kinks.ZERO in kinks))


def _reason(atoms: Atoms, by: fx.Node) -> str:
    where = by.meta.get("where")
    name = f"`{op_name(by.target)}`{f' ({where})' if where else ''}"
    if atoms == Atoms.ZERO:
        return f"it can hold exact zeros, which {name} tells from the result of a rounding inverse"
    return f"{name} may tell its numbers from those that an inverse returns"


def _parts_of(node: fx.Node, put: Mapping[fx.Node, list[tuple[fx.Node, int, int, int]]]) -> list[fx.Node]:
    """Return the parts of what was `put` together that a node taken of it overlaps."""
    split = taken_apart(node)
    taken, number = (node, 0) if split is None else (split, node.args[1])
    source: Any = taken.args[0] if taken.args else None
    parts = put.get(source, [])
    return [
        p
        for t in (directions_of(taken) if parts else ())
        if isinstance(t, Tile) and t.whole is source and t.part == number and t.dim == parts[0][1] and len(t.index)
        for p, _, at, size in parts
        if at <= t.index[-1] and t.index[0] < at + size
    ]


def trained(joint: fx.Graph, outputs: Sequence[Any], static: Iterable[fx.Node]) -> frozenset[fx.Node]:
    """Return those of the `static` inputs of a joint graph that get a gradient."""
    described = zip(outputs, joint.output_node().meta.get("desc", ()), strict=False)
    given = [getattr(d, "grad_of", None) for out, d in described if isinstance(out, fx.Node)]
    return frozenset(n for n in static if n.meta.get("desc") is not None and n.meta["desc"] in given)
