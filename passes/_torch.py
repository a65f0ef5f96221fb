# pyright: reportPrivateUsage=false
"""Every use of private torch API in the graph passes, in one place. Read in torch 2.13 and 2.15."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import graph
from torch.fx.experimental import symbolic_shapes
from torch.fx.node import has_side_effect

from revfx._torch import no_dispatch as no_dispatch, packet_name as packet_name, storage_key as storage_key
from revfx.errors import NondeterminismWarning, RegenerationError, warn


GUARDED: type[Exception] = symbolic_shapes._ShapeEnvGuardError  # what `ShapeEnv.error_on_new_guards` raises


# What compiled graphs check. A custom operator, as no compiler fuses one: what an assertion in a kernel of many threads
# throws ends the process. It is said to write its argument, since whatever writes is kept though nothing reads it; and
# to be unsafe in CUDA graphs, since it waits for the device.
_OPERATORS = torch.library.Library("revfx", "FRAGMENT")
_OPERATORS.define("check(Tensor(a!) ok, str[] messages, bool[] serious) -> ()", tags=(torch.Tag.cudagraph_unsafe,))


OVERFLOWED = (
    "The correction buffer overflowed: many more elements than usual needed an exact copy. Gradients of this step are"
    " accurate to rounding. The buffer grows for the next step."
)
_warned = Counter[str]()


class Said(NamedTuple):
    """The error, or the warning if it is not `serious`, of a check that fails."""

    message: str
    serious: bool = True


def _check(ok: Tensor, messages: Sequence[str], serious: Sequence[bool]) -> None:
    failed = [Said(m, s) for good, m, s in zip(ok.tolist(), messages, serious, strict=True) if not good]
    if not failed:
        return
    said = next((s for s in failed if s.serious), failed[0])  # after an overflow values are off by rounding
    if said.serious:
        raise RegenerationError(said.message)
    _warned[said.message] += 1
    warn(said.message, NondeterminismWarning)


_OPERATORS.impl("check", _check, "CompositeExplicitAutograd")
torch.library.register_fake("revfx::check", lambda ok, messages, serious: None, lib=_OPERATORS)
has_side_effect(torch.ops.revfx.check.default)  # also where compiled autograd traces the backward once more


def overflows() -> int:
    """Return how many backward passes so far warned of an overflow."""
    return _warned[OVERFLOWED]


def boxed_codegen() -> Any:
    """Return a code generator for fx graphs that take their inputs as one list, and empty it."""
    return graph._BoxedCodeGen()


def is_overload(target: Any) -> bool:
    """Return whether a node calls an operator overload."""
    return isinstance(target, torch._ops.OpOverload)


def writes(target: Any) -> bool:
    """Return whether an operator overload writes one of its arguments."""
    return target._schema.is_mutable


def is_pure(target: Any) -> bool:
    """Return whether an operator of torch's own computes the same result whenever it is called."""
    drawn = torch.Tag.nondeterministic_seeded in target.tags
    return target.namespace in ("aten", "prims") and not target._schema.is_mutable and not drawn


def draws(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether an operator overload takes random numbers; attention without dropout says so, but does not."""
    if torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    if "scaled_dot_product" not in packet_name(target):
        return True
    at = [a.name for a in target._schema.arguments].index("dropout_p")
    return (args[at] if at < len(args) else kwargs.get("dropout_p", 0.0)) != 0


@functools.cache
def may_alias(target: Any) -> bool:
    """Return whether an operator may return memory of its arguments, as `_unsafe_view` does, which denies it."""
    if packet_name(target) == "_unsafe_view":
        return True
    return is_overload(target) and any(r.alias_info is not None for r in target._schema.returns)


def plain_input(placeholder: Any) -> int | None:
    """Return which input of the compiled function a joint graph's placeholder is; None where it was made of others."""
    desc = placeholder.meta.get("desc")
    return desc.idx if type(desc).__name__ == "PlainAOTInput" else None


def is_held(t: Tensor) -> bool:
    """Return whether dynamo found an input of a graph to be an attribute of a module, not an argument."""
    return getattr(t, "_dynamo_static_input_type", None) is not None


def is_real(t: Tensor) -> bool:
    """Return whether a parameter has values that this process may look at: not fake, meta or spread over others."""
    return type(t) in (Tensor, nn.Parameter) and not t.is_meta
