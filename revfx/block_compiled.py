"""`rev_block` while `torch.compile` traces it.

A backend of revfx's finds the couplings in plain code. For others: saved-tensor hooks can't be traced. Layers whose
functions are built of smooth modules known to draw nothing, write nothing and read no tensor but their own parameters,
buffers and arguments become one autograd.Function with explicit tensors, whose backward inverts: one for all of them,
since the compiler merges a recomputed g(y1) with the forward's, and so keeps what the last layer of every Function
needs. Layers that may draw, or tell numbers apart as relu does, which rounding would show, and streams in half
precision are checkpointed one by one, keeping their two inputs. Whatever else, which a second run might change, is
plain: functions that are no modules, modules with hooks, classes of the user's.

What decides is part of the traced program, so that the compiled code is guarded by all that it depends on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vjp
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from revfx import _torch
from revfx.coupling import Function, Pair, apply, couple, plain
from revfx.passes.plan import SAMPLE, drifted


Call = tuple[Callable[[Tensor, Sequence[Tensor]], Tensor], list[int]]  # what to call, and which held tensors it reads

PLAIN, CHECKPOINTED, SAVED = 0, 1, 2
REMEDY = "give `rev_block` an `anchor_every`, compile with backend='revfx', or call with `is_training=False`"


def compiled_chain(
    x1: Tensor, x2: Tensor, layers: Sequence[Pair], sides: tuple[Any, Any], anchor_every: int | None = None
) -> tuple[Tensor, Tensor]:
    """(y1, y2) of the chain, each run of layers saved, checkpointed, or plain, whichever it allows.

    What lies between two runs is kept; no run is longer than `anchor_every` layers.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_exporting() or _left_plain():
        return plain(x1, x2, layers, sides)
    most = SAVED if x1.dtype in PRECISE and x2.dtype in PRECISE else CHECKPOINTED
    runs: list[tuple[int, list[Pair]]] = []
    for pair in layers:
        level = min(_level(pair[0]), _level(pair[1]), most)
        if not runs or runs[-1][0] != level or len(runs[-1][1]) == anchor_every:
            runs.append((level, []))
        runs[-1][1].append(pair)
    for level, run in runs:
        if level == SAVED:
            x1, x2 = _saved(x1, x2, run, sides)
        elif level == CHECKPOINTED:
            for pair in run:
                x1, x2 = checkpoint(_one_layer(pair, sides), x1, x2, use_reentrant=False)
        else:
            x1, x2 = plain(x1, x2, run, sides)
    return x1, x2


PRECISE = (torch.float32, torch.float64)


@_torch.constant_when_compiled
def _left_plain() -> bool:
    """Whether revfx's partitioner will find the couplings, or what is around can't be traced with what would be put in
    their place: torch.func transforms, on which dynamo guards, and hooks on saved tensors. Nor is anything put there
    where the functions end the graph.
    """
    from revfx import _compile

    try:
        found = _compile.partitioned_by_revfx()
    except LookupError:
        return True
    return found or _torch.in_functorch_transform() or _torch.has_saved_tensors_hooks()


def _one_layer(pair: Pair, sides: tuple[Any, Any]) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return lambda x1, x2: plain(x1, x2, [pair], sides)


# --- the chain as one autograd.Function
def _saved(x1: Tensor, x2: Tensor, layers: Sequence[Pair], sides: tuple[Any, Any]) -> tuple[Tensor, Tensor]:
    held: list[Tensor] = []  # without duplicates: Dynamo refuses the same tensor twice
    numbers: dict[Tensor, int] = {}
    given = [_hold_side(side, held, numbers) for side in sides]
    calls = [(_bind(f, given[0], held, numbers), _bind(g, given[1], held, numbers)) for f, g in layers]
    if not (x1.requires_grad or x2.requires_grad or any(t.requires_grad for t in held)):
        return plain(x1, x2, layers, sides)
    device = x1.device.type
    cast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))

    def chain(x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        return _looked_at(x1, x2, layers, sides)

    weights = [isinstance(t, nn.Parameter) for t in held]
    return _Chain.apply(
        chain, calls, cast, weights, x1.view_as(x1), x2.view_as(x2), *held
    )  # views: x1 may be x2, or held


def _looked_at(
    x1: Tensor, x2: Tensor, layers: Sequence[Pair], sides: tuple[Any, Any]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(y1, y2), and samples of the pair behind the first layer, the lowest that the backward solves for; raises where a
    sum has lost the digits of a stream that it is to give back.
    """
    samples: list[Tensor] = []
    for layer, (f, g) in enumerate(layers):
        h = apply(f, x2, sides[0])
        y1 = couple(x1, h, "f", layer)
        k = apply(g, y1, sides[1])
        y2 = couple(x2, k, "g", layer)
        if layer:
            sums = [[t.detach() for t in of] for of in ((x1, h, y1), (x2, k, y2))]
            lost = [_lost(y - h, x, y) for x, h, y in sums]
            torch.ops.aten._assert_async.msg(
                ~(lost[0] | lost[1]), f"revfx: layer {layer} of a rev_block adds so much that digits are lost: {REMEDY}"
            )
        elif len(layers) > 1:
            samples = [_sample(y1), _sample(y2)]
        x1, x2 = y1, y2
    return x1, x2, samples


def _lost(now: Tensor, before: Tensor, end: Tensor) -> Tensor:
    """Whether a stream that is computed back from `end` is more than 1 % off; not where that is not finite, as in steps
    that a gradient scaler leaves out.
    """
    return drifted(now, before, before) & torch.isfinite(end.norm())


def _sample(t: Tensor) -> Tensor:
    return t.detach().reshape(-1)[:: max(1, t.numel() // SAMPLE)].clone()


def _hold(tensor: Tensor, held: list[Tensor], numbers: dict[Tensor, int]) -> int:
    if tensor not in numbers:
        numbers[tensor] = len(held)
        held.append(tensor)
    return numbers[tensor]


def _hold_side(side: Any, held: list[Tensor], numbers: dict[Tensor, int]) -> tuple[list[int | None], list[Any], Any]:
    """Per leaf of a side input its number (None: not a tensor), the leaves that are no tensors, and the structure."""
    leaves, spec = pytree.tree_flatten(side)
    at = [_hold(t, held, numbers) if isinstance(t, Tensor) else None for t in leaves]
    return at, [None if isinstance(t, Tensor) else t for t in leaves], spec


def _bind(function: Function, side: Any, held: list[Tensor], numbers: dict[Tensor, int]) -> Call:
    """The function as one of x and of the held tensors, which stand for its parameters, buffers and side input."""
    at, others, spec = side
    names: list[tuple[str, int]] = []
    if isinstance(function, nn.Module):
        for name, tensor in function.named_parameters(remove_duplicate=False):
            names.append((name, _hold(tensor, held, numbers)))
        for name, tensor in function.named_buffers(remove_duplicate=False):
            names.append((name, _hold(tensor, held, numbers)))

    def call(x: Tensor, have: Sequence[Tensor]) -> Tensor:
        args: tuple[Any, ...] = (x,)
        leaves = [other if i is None else have[i] for i, other in zip(at, others, strict=True)]
        if leaves and not (len(leaves) == 1 and at[0] is None and others[0] is None):
            args = (x, pytree.tree_unflatten(leaves, spec))
        if not isinstance(function, nn.Module):
            return function(*args)
        return functional_call(function, {name: have[i] for name, i in names}, args, tie_weights=False)

    return call, [*(i for _, i in names), *(i for i in at if i is not None)]


class _Chain(torch.autograd.Function):
    """Additive couplings that keep their last pair and the held tensors; the backward inverts layer by layer."""

    @staticmethod
    def forward(
        ctx: Any,
        chain: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, list[Tensor]]],
        calls: list[tuple[Call, Call]],
        cast: tuple[str, torch.dtype, bool],
        weights: list[bool],
        x1: Tensor,
        x2: Tensor,
        *held: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """(y1, y2), by the functions themselves: swapping their parameters would make every intermediate an output."""
        y1, y2, samples = chain(x1, x2)
        # what is saved is read as it is when the graph ends: all that may be written to until then is copied
        own = [t if is_weight else t.clone() for t, is_weight in zip(held, weights, strict=True)]
        ctx.save_for_backward(y1.clone(), y2.clone(), x2.clone(), *samples, *own)
        ctx.samples = len(samples)
        ctx.calls = calls
        ctx.cast = cast
        return y1, y2

    @staticmethod
    def backward(ctx: Any, d1: Tensor, d2: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The gradients of x1, x2 and of every held tensor that needs one."""
        y1, y2, x2, *held = ctx.saved_tensors
        samples, held = held[: ctx.samples], held[ctx.samples :]
        ends = y1, y2
        needs = ctx.needs_input_grad[6:]
        grads: list[Tensor | None] = [None] * len(held)
        for layer, (f, g) in reversed(list(enumerate(ctx.calls))):
            if layer == 0 and samples:
                _compare((y1, y2), samples, ends, d1)  # of all the lowest, where rounding has grown most
            y2, d1 = _undo(g, y1, y2, d1, d2, held, needs, grads, ctx.cast)
            y2 = y2 if layer else x2  # a given stream may hold exact zeros, where rounding would flip a relu
            y1, d2 = _undo(f, y2, y1, d2, d1, held, needs, grads, ctx.cast)
        return None, None, None, None, d1, d2, *grads


def _compare(
    now: tuple[Tensor, Tensor], before: Sequence[Tensor], ends: tuple[Tensor, Tensor], tangent: Tensor
) -> None:
    """None; raises where a stream came back more than 1 % off."""
    lost = [_lost(_sample(x), then, _sample(y)) for x, then, y in zip(now, before, ends, strict=True)]
    # of the forward alone nothing here depends but on the tangent: else the compiler would look there
    ok = ~(lost[0] | lost[1]) | tangent.reshape(-1)[:1].isnan().any()
    torch.ops.aten._assert_async.msg(
        ok, f"revfx: streams of a rev_block came back more than 1 % off, by rounding: {REMEDY}"
    )


def _undo(
    call: Call,
    x: Tensor,
    y: Tensor,
    dx: Tensor,
    dy: Tensor,
    held: list[Tensor],
    needs: Sequence[bool],
    grads: list[Tensor | None],
    cast: Any,
) -> tuple[Tensor, Tensor]:
    """(the stream before `y = stream + call(x)`, the gradient of x), from one evaluation; adds to `grads`."""
    wanted = [i for i in dict.fromkeys(call[1]) if needs[i]]

    def function(x: Tensor, *tensors: Tensor) -> Tensor:
        have = list(held)
        for i, t in zip(wanted, tensors, strict=True):
            have[i] = t
        return call[0](x, have)

    with torch.autocast(cast[0], dtype=cast[1], enabled=cast[2]):
        pulled: tuple[Any, ...] = vjp(function, x, *[held[i] for i in wanted])
        h, pull = pulled
    gx, *rest = pull(dy.to(h.dtype))
    for i, grad in zip(wanted, rest, strict=True):
        so_far = grads[i]
        grads[i] = grad if so_far is None else so_far + grad
    return y - h, dx + gx


# --- what is known about functions and modules
def _named(namespace: Any, names: str) -> frozenset[Any]:
    return frozenset(getattr(namespace, n) for n in names.split() if hasattr(namespace, n))


SMOOTH = _named(torch, "tanh sigmoid sin cos exp neg square erf erfc atan") | _named(
    F, "gelu silu elu softplus mish tanh sigmoid celu logsigmoid softsign"
)
FUNCTIONS = SMOOTH | _named(torch, "relu abs sqrt rsqrt") | _named(F, "relu selu leaky_relu hardtanh hardswish relu6")
KINKED = _named(
    nn, "ReLU ReLU6 LeakyReLU PReLU ELU SELU Softshrink Hardshrink Hardtanh Hardswish Hardsigmoid"
)  # their slopes tell numbers apart
FRESH = _named(  # never return their input
    nn,
    "Linear Bilinear Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d LayerNorm GroupNorm RMSNorm",
)
PURE = FRESH | _named(
    nn,
    "Identity Sequential ModuleList ModuleDict Flatten Unflatten ReLU ReLU6 LeakyReLU GELU SiLU ELU SELU"
    " CELU Mish Tanh Sigmoid LogSigmoid Softplus Softsign Softshrink Hardshrink Tanhshrink Hardtanh"
    " Hardswish Hardsigmoid Softmax LogSoftmax PReLU GLU AvgPool1d AvgPool2d AvgPool3d ZeroPad1d ZeroPad2d"
    " ConstantPad1d ConstantPad2d ReflectionPad1d ReflectionPad2d ReplicationPad1d ReplicationPad2d"
    " PixelShuffle PixelUnshuffle ChannelShuffle LocalResponseNorm",
)
DROPS = _named(nn, "Dropout Dropout1d Dropout2d Dropout3d AlphaDropout FeatureAlphaDropout")
NORMS = _named(nn, "BatchNorm1d BatchNorm2d BatchNorm3d InstanceNorm1d InstanceNorm2d InstanceNorm3d")
PLAIN_TENSORS = frozenset((Tensor, nn.Parameter))


def _level(function: Any) -> int:
    """How the layer of one function may be computed: SAVED, CHECKPOINTED or PLAIN."""
    if not isinstance(function, nn.Module):
        if any(function is known for known in SMOOTH):
            return SAVED
        return CHECKPOINTED if any(function is known for known in FUNCTIONS) else PLAIN
    if _torch.has_global_module_hooks() or getattr(function, "inplace", False):
        return PLAIN
    return min(_part_level(part) for part in function.modules())


def _part_level(part: Any) -> int:
    own = part.__dict__
    if _torch.has_hooks(part) or any(isinstance(v, Tensor) for v in own.values()):
        return PLAIN
    slots = _torch.slots(part)
    for tensors in slots[:2]:
        if any(t is not None and type(t) not in PLAIN_TENSORS for t in tensors.values()):
            return PLAIN
    kind = type(part)
    if not _writes_fresh_only(part, kind is nn.Sequential):
        return PLAIN
    if kind in PURE:
        return CHECKPOINTED if kind in KINKED else SAVED
    if kind in DROPS:
        return CHECKPOINTED if part.training and part.p > 0 else SAVED
    if kind in NORMS:
        return CHECKPOINTED if part.training and part.running_mean is not None else SAVED
    if kind is nn.MultiheadAttention:
        return CHECKPOINTED if part.training and part.dropout > 0 else SAVED
    return PLAIN  # the user's code may leave something behind, which a second run would do again


def _writes_fresh_only(part: nn.Module, in_order: bool) -> bool:
    """Whether children that work in place certainly follow one that makes a new tensor; others may write the stream."""
    fresh = False
    for child in part.children():
        if getattr(child, "inplace", False) and not (in_order and fresh):
            return False
        fresh = type(child) in FRESH
    return True
