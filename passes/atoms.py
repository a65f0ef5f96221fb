"""Which values have atoms: numbers, such as an exact 0, that they take with positive probability.

A rounding inverse gives an exact zero back as +-1e-17, which flips relu's mask in the backward, so the head of a
rounding arc may not have atoms. They are made by relu, clamp, dropout and the like, pass through layout and elementwise
operations, and survive a sum at most where both addends have them: that is counted while the forward runs. Matrix
products, convolutions and normalisations over a sample mix so many numbers that none is likelier than another, unless
they are all zero (padded rows, weights that start as zeros): what they give directly is counted too.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, fx

from revfx.passes.sizes import no_new_guards
from revfx.rules import Tile, arguments, op_name, rule_for


MAKERS = frozenset(
    """relu relu6 leaky_relu prelu rrelu threshold hardtanh hardswish hardsigmoid clamp clamp_min clamp_max clip max
    min maximum minimum amax amin fmax fmin where abs absolute sign sgn round floor ceil trunc fix frac heaviside
    softshrink hardshrink max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d max_unpool2d
    dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout eq ne lt le gt ge masked_fill
    masked_select masked_scatter one_hot zeros zeros_like ones ones_like full full_like tril triu embedding nan_to_num
    topk sort cummax cummin quantile median mode pad bernoulli native_dropout max_pool2d_with_indices
    max_pool3d_with_indices constant_pad_nd zero full_like new_zeros new_full""".split()
)
MIXERS = frozenset(
    """linear matmul mm bmm addmm baddbmm einsum conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d
    bilinear addmv convolution native_layer_norm native_group_norm _scaled_dot_product_flash_attention_for_cpu
    _scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention
    inductor_random layer_norm group_norm instance_norm rms_norm scaled_dot_product_attention
    multi_head_attention_forward rand randn randn_like rand_like normal lstm gru rnn_tanh tensordot outer mv
    dot""".split()
)
PICKS = frozenset("getitem __getitem__ index index_select gather take take_along_dim".split())
SUMS = frozenset(
    "add sub subtract rsub lerp addcmul addcdiv addcmul __rsub__ __add__ __radd__ __sub__ __iadd__ __isub__".split()
)
PRODUCTS = frozenset("mul multiply div divide true_divide __mul__ __rmul__ __rdiv__ __truediv__".split())
JOINS = frozenset("cat concat concatenate stack hstack vstack dstack slice_scatter select_scatter".split())


NONE, RARE, PERHAPS, CERTAIN = 0, 1, 2, 3


def has_atoms(name: str, operands: Iterable[int]) -> int:
    """NONE, RARE or PERHAPS (zeros are counted at run time) or CERTAIN atoms in what `name` gives for such operands.

    A sum of which an addend is RARE has none. A number that is added, or multiplied by, moves atoms to where nothing is
    counted.
    """
    bare = name if name.endswith("__") else name.rstrip("_")
    operands = list(operands)
    if bare in MAKERS:
        return CERTAIN
    if not operands:
        return NONE
    if bare in MIXERS:
        return RARE
    if bare in PICKS:
        return operands[0]
    if bare in JOINS and min(operands) < max(operands):
        return min(PERHAPS, max(operands))  # one part has atoms, another none: whichever is taken out again is counted
    if bare in SUMS and len(operands) == 1:
        return CERTAIN if operands[0] >= PERHAPS else NONE
    if bare in PRODUCTS and len(operands) == 1:
        return operands[0]
    if bare in SUMS:
        return PERHAPS if min(operands) >= PERHAPS else NONE
    return min(PERHAPS, max(operands)) if bare in PRODUCTS else max(operands)


def atoms(graph: fx.Graph) -> dict[fx.Node, int]:
    """For every node of a graph whether its value may have atoms; inputs, sources and unseen insides have.

    A part of what was put together has those of the parts that it overlaps.
    """
    found: dict[fx.Node, int] = {}
    joined: dict[fx.Node, tuple[int, list[tuple[range, int]]]] = {}
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            found[node] = CERTAIN
        elif node.op == "call_module" or node.meta.get("opaque", False):
            found[node] = int(node.meta.get("atoms", CERTAIN))
        elif node.op in ("call_function", "call_method"):
            name = op_name(node.target)
            found[node] = has_atoms(name, [found[n] for n in node.all_input_nodes])
            if name == "where" and len(node.args) == 3:
                a, b = node.args[1:] if node.op == "call_function" else (node.args[0], node.args[2])
                numbers = not (isinstance(a, fx.Node) and isinstance(b, fx.Node))
                found[node] = CERTAIN if numbers else min(PERHAPS, max(found[a], found[b]))
            elif name in ("cat", "concat", "concatenate"):
                joined.update(_joined(node, found))
            else:
                part = _part_of(node, joined)
                found[node] = found[node] if part is None else part
    return found


def _joined(node: fx.Node, found: Mapping[fx.Node, int]) -> dict[fx.Node, tuple[int, list[tuple[range, int]]]]:
    """Along which dimension a node puts tensors together, and which part has which atoms."""
    parts, dim, axis = arguments(node, "tensors", dim=0, axis=None)
    whole = node.meta.get("val")
    if not isinstance(whole, Tensor) or not all(isinstance(p, fx.Node) for p in parts):
        return {}
    dim = (dim if axis is None else axis) % whole.dim()
    at, ranges = 0, []
    for p in parts:
        size = p.meta["val"].shape[dim] if p.meta["val"].dim() == whole.dim() else 0
        if not isinstance(size, int):
            return {}
        ranges.append((range(at, at + size), found[p]))
        at += size
    return {node: (dim, ranges)}


def _part_of(node: fx.Node, joined: Mapping[fx.Node, tuple[int, list[tuple[range, int]]]]) -> int | None:
    """The atoms of a node that is a part of what was put together; None if it is not known to be one."""
    taken = node
    number: Any = 0  # or the key, where the whole is a dict
    source: Any = node.args[0] if node.args else None
    if node.target is operator.getitem and isinstance(source, fx.Node) and not isinstance(source.meta["val"], Tensor):
        taken, number = source, node.args[1]
        source = source.args[0] if source.args else None
    if source not in joined:
        return None
    dim, ranges = joined[source]
    rule = rule_for(taken) if taken.meta.get("barrier") is None else None
    with no_new_guards(taken.meta["val"]):
        for t in rule(taken) if rule is not None else ():
            if isinstance(t, Tile) and t.whole is source and t.part == number and t.dim == dim and len(t.index):
                first, last = t.index[0], t.index[-1]
                return max((level for r, level in ranges if r.start <= last and first < r.stop), default=CERTAIN)
    return None
