"""Traits of aten operations: how each treats exact numbers, and the values that a rounding inverse must not regenerate.

An inverse regenerates a value up to rounding. That matters only if an operation distinguishes a number from its
neighbours: if an exact zero (of relu, dropout, a mask, padding) comes back as 1e-17, relu passes its gradient on, and
1 - 1e-16 is below the step of `floor`. Two analyses of a compiled graph find these cases. Downwards, from inputs to
outputs: the numbers that a value takes with positive probability, its *atoms*. Upwards: the points where operations
jump or bend, their *kinks*. A value with an atom at a kink of a reader is saved. Random numbers, matrix products with
weights, and sums with either have no atoms. An operation outside of the table has the worst traits.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum, IntFlag
from typing import Any

from torch import Tensor, fx

from revfx.passes import _torch
from revfx.passes.moves import container_of, directions_of
from revfx.passes.sizes import is_fixed, is_same_shape, tensors_of
from revfx.rules import Tile, op_name
from revfx.rules.layout import joined


class Atoms(IntEnum):
    """The numbers that a value takes with positive probability: none, zero at most, any."""

    NONE, ZERO, ANY = range(3)


class Kinks(IntFlag):
    """The points where the readers of a value jump or bend: nowhere, at zero, elsewhere."""

    NONE, ZERO, ELSEWHERE, ANYWHERE = range(4)


class Kind(Enum):
    """The way an operation computes the numbers of its result from those of its operands.

    MOVE: the same numbers, perhaps beside given ones. MAP: a function of each number. SUM, PRODUCT: of one number of
    each operand. MIX: sums of products of many, with weights. ADDS: sums of many. NORM: many, less their mean or
    over their size. DRAW: random numbers. FILL: a given number.
    """

    MOVE, MAP, SUM, PRODUCT, MIX, ADDS, NORM, DRAW, FILL = range(9)


@dataclass(frozen=True, slots=True)
class Trait:
    """The traits of one operation: its kind, its kinks, the atoms that it `makes` of other numbers.

    `at_zero`: the operation maps zero to zero. The arguments of a FILL, and those that a MOVE puts beside the numbers
    of its operand, are further atoms.
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
        convert_element_type square pow""",
    Trait(Kind.MAP, makes=Atoms.ZERO): "native_dropout",
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
TRAITS: dict[str, Trait] = {}
for _trait, _names in _ROWS.items():
    TRAITS.update(dict.fromkeys(_names.split(), _trait))
THRESHOLD_OPS = frozenset("eq ne lt le gt ge clamp clamp_min clamp_max".split())
WRITING_OPS = frozenset(
    """where masked_fill constant_pad_nd scatter index_put _unsafe_index_put index_fill tril triu
    _unsafe_masked_index""".split()
)  # moves that put given numbers beside those of the operand
ZERO_FILLING_OPS = frozenset("zeros zeros_like new_zeros tril triu".split())
NUMBER_FILLING_OPS = frozenset(
    """full full_like new_full scalar_tensor masked_fill where scatter index_fill constant_pad_nd
    _unsafe_masked_index""".split()
)

# An operand of a `cat`: the node, the dimension, its first index along it and its size (see `joined`).
CatOperand = tuple[fx.Node, int, int, int]


def trait_of(node: fx.Node) -> Trait:
    """Look up the traits of a node's operation; some depend on its arguments."""
    if node.target is operator.getitem:
        return TRAITS["getitem"]
    name = _torch.packet_name(node.target)
    trait = TRAITS.get(name)
    if trait is None:
        return _unlisted_trait(node, name)
    if name in THRESHOLD_OPS:
        limits = [x for x in (*node.args[1:], *node.kwargs.values()) if x is not None]
        if limits == [0]:
            return Trait(Kind.MAP, Kinks.ZERO, Atoms.ZERO)
    if name == "pow":
        exponent = node.args[1]
        if not isinstance(exponent, (int, float)) or exponent <= 0 or not float(exponent).is_integer():
            return Trait(Kind.MAP, Kinks.ZERO, at_zero=False)
    if name in ("add", "sub", "rsub") and any(_numbers(node.args[:2])):
        return Trait(Kind.MAP, at_zero=False)
    if name in ("mul", "div") and node.kwargs.get("rounding_mode"):
        return UNKNOWN_TRAIT  # it jumps at every integer
    return trait


def _unlisted_trait(node: fx.Node, name: str) -> Trait:
    """Return the traits of an operation outside of the table: a view, a function's own backward, or an unknown one."""
    forward_name, is_backward, _ = name.partition("_backward")
    if not is_backward:
        if _torch.may_alias(node.target):
            return Trait(Kind.MOVE)
        return UNKNOWN_TRAIT
    # A backward may read the forward's result; that of relu compares it with zero.
    if name == "threshold_backward" and node.args[2] == 0:
        return Trait(Kind.MAP, Kinks.ZERO)
    forward = TRAITS.get(forward_name)
    if forward is not None and forward.kind is Kind.MAP:
        return Trait(Kind.MAP, forward.kinks)
    return Trait(Kind.MAP)


def _numbers(values: Iterable[Any]) -> list[float]:
    return [x for x in values if isinstance(x, (int, float))]


def _is_continuous(node: fx.Node) -> bool:
    """Return whether a result of a node may have no atoms: a tensor of real or complex numbers."""
    return any(t.is_floating_point() or t.is_complex() for t in tensors_of(node.meta.get("val")))


# --- downwards: atoms
def atoms_of(graph: fx.Graph, trained: Iterable[fx.Node]) -> dict[fx.Node, Atoms]:
    """Return the atoms of every node of a graph; `trained` weights have none, all other inputs may have any."""
    found = dict.fromkeys(trained, Atoms.NONE)
    cats: dict[fx.Node, list[CatOperand]] = {}
    for node in graph.nodes:
        if node in found:
            continue
        if node.op != "call_function" or not _is_continuous(node):
            found[node] = Atoms.ANY
            continue
        if op_name(node.target) == "cat":
            cat_operands = list(joined(node))
            if cat_operands and is_fixed(size for *_, size in cat_operands):
                cats[node] = cat_operands
        overlapped = _overlapped_operands(node, cats)
        if overlapped:  # a part of a concatenation has the atoms of the operands it overlaps
            found[node] = max(found[operand] for operand in overlapped)
        else:
            found[node] = _result_atoms(node, trait_of(node), found)
    return found


def _overlapped_operands(node: fx.Node, cats: Mapping[fx.Node, Sequence[CatOperand]]) -> list[fx.Node]:
    """Return the operands of a `cat` that a node overlaps, if the node is a part of its result."""
    taken, part_number = node, 0
    split = container_of(node)
    if split is not None:
        taken, part_number = split, node.args[1]
    source: Any = next(iter(taken.args), None)
    found: list[fx.Node] = []
    if source not in cats:
        return found
    cat_dim = cats[source][0][1]
    for tile in directions_of(taken):
        if not isinstance(tile, Tile) or tile.whole is not source or tile.part != part_number:
            continue
        if tile.dim != cat_dim or len(tile.index) == 0:
            continue
        for operand, _, start, size in cats[source]:
            if start <= tile.index[-1] and tile.index[0] < start + size:
                found.append(operand)
    return found


def _result_atoms(node: fx.Node, trait: Trait, found: Mapping[fx.Node, Atoms]) -> Atoms:
    """Derive the atoms of a result from those of the operands."""
    name, kind = op_name(node.target), trait.kind
    if kind in (Kind.SUM, Kind.PRODUCT):
        operands = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
    else:  # integers and booleans are indices or conditions
        operands = list(filter(_is_continuous, node.all_input_nodes))
    atoms = [found[n] for n in operands]
    most, least = max(atoms, default=Atoms.NONE), min(atoms, default=Atoms.NONE)

    if kind in (Kind.NORM, Kind.DRAW):
        return Atoms.NONE
    if kind is Kind.FILL or (kind is Kind.MOVE and name in WRITING_OPS):
        return max(most, _filled_atoms(node, name))
    if kind is Kind.MOVE:
        return most
    if kind is Kind.SUM:
        full_size = [found[n] for n in operands if is_same_shape(n.meta["val"].shape, node.meta["val"].shape)]
        if most == Atoms.NONE or Atoms.NONE in full_size:
            return Atoms.NONE
        return most if len(full_size) == len(operands) else Atoms.ANY  # a broadcast operand moves zeros
    if kind is Kind.PRODUCT:
        if 0 in node.args[:2]:
            return Atoms.ZERO
        if least == Atoms.NONE:
            return min(most, Atoms.ZERO)
        return most
    if kind is Kind.MIX:
        return Atoms.NONE if least == Atoms.NONE else Atoms.ANY
    if kind is Kind.ADDS:
        return Atoms.ANY if most == Atoms.ANY else Atoms.NONE
    if most and not trait.at_zero:  # a function moves zeros
        return Atoms.ANY
    return max(trait.makes, most)


def _filled_atoms(node: fx.Node, name: str) -> Atoms:
    """Return the atoms that an operation fills in or writes, apart from those of its operands."""
    if name in ZERO_FILLING_OPS:
        return Atoms.ZERO
    if name not in NUMBER_FILLING_OPS:
        return Atoms.NONE if name in WRITING_OPS else Atoms.ANY  # it writes a tensor, which is an operand
    numbers = _numbers(node.args)
    if any(numbers):
        return Atoms.ANY
    if not numbers and name in ("masked_fill", "where", "scatter", "index_fill"):
        return Atoms.NONE  # it writes a tensor
    return Atoms.ZERO


# --- upwards: kinks
def find_barred(graph: fx.Graph, trained: Iterable[fx.Node]) -> dict[fx.Node, str]:
    """Return the nodes that no rounding inverse may regenerate, with the reasons: a reader has a kink at an atom."""
    atoms = atoms_of(graph, trained)
    seen: dict[fx.Node, tuple[Kinks, fx.Node]] = {}  # the kinks of all readers, and the last reader that has one

    def note(node: fx.Node, kinks: Kinks, reader: fx.Node) -> None:
        if kinks:
            before, last_reader = seen.get(node, (Kinks.NONE, reader))
            seen[node] = (before | kinks, last_reader)

    calls = [n for n in graph.nodes if n.op == "call_function"]
    for node in reversed(calls):
        trait = trait_of(node)
        above, reader = seen.get(node, (Kinks.NONE, node))
        for operand in filter(_is_continuous, node.all_input_nodes):
            note(operand, trait.kinks, node)
            note(operand, _kinks_through(trait, above, atoms, node, operand), reader)
    # A moved value holds elements of its operand. An inverse could regenerate them there as well.
    for node in calls:
        if trait_of(node).kind is Kind.MOVE:
            for operand in node.all_input_nodes:
                if operand in seen:
                    note(node, *seen[operand])
    return {n: _reason(atoms[n], reader) for n, (kinks, reader) in seen.items() if _meet(atoms[n], kinks)}


def _kinks_through(
    trait: Trait, above: Kinks, atoms: Mapping[fx.Node, Atoms], node: fx.Node, operand: fx.Node
) -> Kinks:
    """Move the kinks of later operations from a result to an operand.

    Args:
        trait: the traits of the operation.
        above: the kinks of the readers of its result.
        atoms: the atoms of every node.
        node: the operation.
        operand: the operand.

    Returns:
        The kinks at the operand; none if the result has no atoms there.
    """
    if not _meet(atoms[node], above) or trait.kind in (Kind.MIX, Kind.NORM, Kind.DRAW, Kind.FILL):
        return Kinks.NONE
    if not trait.at_zero or trait.kind is Kind.ADDS:
        return Kinks.ANYWHERE
    if trait.kind is Kind.SUM:  # another addend may shift them
        for other in filter(_is_continuous, node.all_input_nodes):
            if other is not operand and atoms[other] == Atoms.ANY:
                return Kinks.ANYWHERE
    return above


def _meet(atoms: Atoms, kinks: Kinks) -> bool:
    """Return whether a value may take a number at which a reader has a kink."""
    return bool(kinks) and (atoms == Atoms.ANY or (atoms == Atoms.ZERO and Kinks.ZERO in kinks))


def _reason(atoms: Atoms, reader: fx.Node) -> str:
    name, where = f"`{op_name(reader.target)}`", reader.meta.get("where")
    if where:
        name += f" ({where})"
    if atoms == Atoms.ZERO:
        return f"it can hold exact zeros, which {name} tells from the result of a rounding inverse"
    return f"{name} may tell its numbers from those that an inverse returns"


def find_trained(joint: fx.Graph, outputs: Sequence[Any], static: Iterable[fx.Node]) -> frozenset[fx.Node]:
    """Return those of the `static` inputs of a joint graph that get a gradient."""
    differentiated: list[Any] = []
    for out, description in zip(outputs, joint.output_node().meta.get("desc", ()), strict=False):
        if isinstance(out, fx.Node) and hasattr(description, "grad_of"):
            differentiated.append(description.grad_of)
    return frozenset(n for n in static if n.meta.get("desc") in differentiated)
