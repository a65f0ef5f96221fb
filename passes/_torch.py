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


# The check at the end of a compiled backward. It is a custom operator, which no compiler fuses: a failed assertion in a
# kernel of many threads would end the process. Its schema claims to write the argument, so that no pass removes it as
# unused. It is unsafe in CUDA graphs, since it waits for the device.
_OPERATORS = torch.library.Library("revfx", "FRAGMENT")
_OPERATORS.define("check(Tensor(a!) ok, str[] messages, bool[] serious) -> ()", tags=(torch.Tag.cudagraph_unsafe,))


OVERFLOWED = (
    "The correction buffer overflowed: many more elements than usual needed an exact copy. Gradients of this step are"
    " accurate to rounding. The buffer grows for the next step."
)
_warned = Counter[str]()


class CheckMessage(NamedTuple):
    """The text of a failed check: of an error if `serious`, else of a warning."""

    message: str
    serious: bool = True


def _check(ok: Tensor, messages: Sequence[str], serious: Sequence[bool]) -> None:
    warnings: list[str] = []
    for passed, message, is_serious in zip(ok.tolist(), messages, serious, strict=True):
        if not passed and is_serious:
            raise RegenerationError(message)
        if not passed:
            warnings.append(message)
    if warnings:  # one is enough: an overflow makes the comparisons after it fail as well
        _warned[warnings[0]] += 1
        warn(warnings[0], NondeterminismWarning)


_OPERATORS.impl("check", _check, "CompositeExplicitAutograd")
torch.library.register_fake("revfx::check", lambda ok, messages, serious: None, lib=_OPERATORS)
has_side_effect(torch.ops.revfx.check.default)  # compiled autograd traces the backward once more, and must keep it


def count_overflows() -> int:
    """Return the number of backward passes that warned of an overflow so far."""
    return _warned[OVERFLOWED]


def boxed_codegen() -> Any:
    """Return a code generator for fx graphs that take their inputs as one list and clear the list."""
    return graph._BoxedCodeGen()


def is_overload(target: Any) -> bool:
    """Return whether a node calls an operator overload."""
    return isinstance(target, torch._ops.OpOverload)


def is_mutating(target: Any) -> bool:
    """Return whether an operator overload writes one of its arguments."""
    return target._schema.is_mutable


def is_pure(target: Any) -> bool:
    """Return whether an operator is one of torch's own, writes nothing and takes no random numbers."""
    is_random = torch.Tag.nondeterministic_seeded in target.tags
    return target.namespace in ("aten", "prims") and not target._schema.is_mutable and not is_random


def is_random(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether an operator overload takes random numbers.

    Attention is tagged as random, but takes none without dropout.
    """
    if torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    if "scaled_dot_product" not in packet_name(target):
        return True
    position = [a.name for a in target._schema.arguments].index("dropout_p")
    if position < len(args):
        return args[position] != 0
    return kwargs.get("dropout_p", 0.0) != 0


@functools.cache
def may_alias(target: Any) -> bool:
    """Return whether a result of an operator may be a view of an argument."""
    if packet_name(target) == "_unsafe_view":  # its schema denies it
        return True
    return is_overload(target) and any(r.alias_info is not None for r in target._schema.returns)


def input_number(placeholder: Any) -> int | None:
    """Return the number of a placeholder among the compiled function's inputs; None if it is computed from others."""
    desc = placeholder.meta.get("desc")
    return desc.idx if type(desc).__name__ == "PlainAOTInput" else None


def is_module_attribute(t: Tensor) -> bool:
    """Return whether an input of a dynamo graph is an attribute of a module, not an argument."""
    return getattr(t, "_dynamo_static_input_type", None) is not None


def is_real(t: Tensor) -> bool:
    """Return whether this process can read a tensor's values: it is not fake, meta or distributed."""
    return type(t) in (Tensor, nn.Parameter) and not t.is_meta
