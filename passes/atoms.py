"""Which values have atoms: numbers, such as an exact 0, that they take with positive probability.

A rounding inverse gives an exact zero back as +-1e-17, which flips relu's mask in the backward, so the head of a
rounding arc may not have atoms. They are made by relu, clamp, dropout and the like, pass through layout and elementwise
operations, and survive a sum only where both addends have them. Matrix products, convolutions and normalisations over
a sample mix so many numbers that none is likelier than another.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from revfx.rules import op_name


MAKERS = frozenset(
    """relu relu6 leaky_relu prelu rrelu threshold hardtanh hardswish hardsigmoid clamp clamp_min clamp_max clip max min maximum
    minimum amax amin fmax fmin where abs absolute sign sgn round floor ceil trunc fix frac heaviside softshrink hardshrink
    max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d max_unpool2d dropout dropout1d dropout2d dropout3d
    alpha_dropout feature_alpha_dropout eq ne lt le gt ge masked_fill masked_select masked_scatter one_hot zeros zeros_like ones
    ones_like full full_like tril triu embedding nan_to_num topk sort cummax cummin quantile median mode pad bernoulli""".split()
)
MIXERS = frozenset(
    """linear matmul mm bmm addmm baddbmm einsum conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d bilinear
    layer_norm group_norm instance_norm rms_norm scaled_dot_product_attention multi_head_attention_forward rand randn randn_like
    rand_like normal lstm gru rnn_tanh tensordot outer mv dot""".split()
)
SUMS = frozenset(
    "add sub subtract rsub lerp addcmul addcdiv addcmul __rsub__ __add__ __radd__ __sub__ __iadd__ __isub__".split()
)


def has_atoms(name: str, operands: Iterable[bool]) -> bool:
    """Whether the result of the operation `name` has atoms, given whether each of its tensor operands has."""
    bare = name if name.endswith("__") else name.rstrip("_")
    operands = list(operands)
    if bare in MAKERS:
        return True
    if bare in MIXERS:
        return False
    return bool(operands) and (all(operands) if bare in SUMS else any(operands))


def atoms(graph: fx.Graph) -> dict[fx.Node, bool]:
    """For every node of a graph whether its value may have atoms; inputs, sources and unseen insides do."""
    found: dict[fx.Node, bool] = {}
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            found[node] = True
        elif node.op == "call_module":
            found[node] = bool(node.meta.get("atoms", True))
        elif node.op in ("call_function", "call_method"):
            if node.meta.get("opaque", False):
                found[node] = bool(node.meta.get("atoms", True))
            else:
                found[node] = has_atoms(op_name(node.target), [found[n] for n in node.all_input_nodes])
    return found
