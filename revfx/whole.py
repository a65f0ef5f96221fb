"""What a plan relies on that its recorded code did not read: the insides of modules that it calls whole, and weights.

Compared at every call, so cheap things come first: a module costs about two microseconds.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any

from torch import Tensor, nn

from revfx import _torch, fingerprint
from revfx.passes.numbers import is_generic
from revfx.reads import Reads


Spot = tuple[str, str]  # where a tensor hangs: the path of a module, and a name
Written = frozenset[tuple[type, str]]  # attributes that modules of a class set in their own forward


@dataclass(frozen=True)
class Part:
    """One module in or below one that is called whole, as it was.

    `names` are attributes that are the same while they hold the same object, `values` what they held; `others` are
    compared by content. An attribute that is none of the `known` is new. `children` are addresses: each child has a
    part of its own, which says whether it is still alive.
    """

    module: weakref.ref[nn.Module]
    kind: type
    known: frozenset[str]
    names: tuple[str, ...]
    values: tuple[Any, ...]
    others: tuple[str, ...]
    contents: tuple[Any, ...]
    children: tuple[tuple[str, ...], tuple[int, ...]]
    unset: frozenset[str]
    tensors: tuple[Any, ...]
    hooked: bool

    @staticmethod
    def of(module: nn.Module, ignored: frozenset[str]) -> Part:
        """`module` as it is now, but for the attributes and tensors that are `ignored`."""
        d = vars(module)
        compared = [k for k in d if k not in fingerprint.SKIPPED and k not in ignored]
        names = tuple(k for k in compared if fingerprint.lasting(d[k]))
        others = tuple(k for k in compared if k not in names)
        return Part(
            weakref.ref(module), type(module), frozenset((*d, *ignored, *fingerprint.SKIPPED)),
            names, tuple(d[k] for k in names), others, tuple(fingerprint.key(d[k]) for k in others),
            _children(module), ignored, _tensors(module, ignored), _torch.has_hooks(module),
        )  # fmt: skip

    def same(self) -> bool:
        """Whether the module is as it was; a fraction may be another one."""
        module = self.module()
        if module is None or type(module) is not self.kind:
            return False
        d = vars(module)
        return (
            d.keys() <= self.known
            and (all(map(is_, map(d.get, self.names), self.values)) or self._alike(d))
            and (not self.others or self.contents == tuple(fingerprint.key(d.get(k)) for k in self.others))
            and _children(module) == self.children
            and _tensors(module, self.unset) == self.tensors
            and _torch.has_hooks(module) == self.hooked
        )

    def _alike(self, d: Mapping[str, Any]) -> bool:
        return all(_kind(d.get(k)) == _kind(v) for k, v in zip(self.names, self.values, strict=True))


def _kind(value: Any) -> Any:
    """What is compared of a value. Of a fraction only its sign and whether it is more than 1: a rate that is changed at
    every step would otherwise make a plan at every step, and what is found of a module depends on it no further.
    """
    fraction = isinstance(value, float) and not value.is_integer() and value == value
    return (float, value > 0, abs(value) > 1) if fraction else fingerprint.key(value)


_NONE: tuple[tuple[str, ...], tuple[int, ...]] = ((), ())


def _children(module: nn.Module) -> tuple[tuple[str, ...], tuple[int, ...]]:
    children = _torch.children(module)
    return (tuple(children), tuple(map(id, children.values()))) if children else _NONE


def _tensors(module: nn.Module, without: frozenset[str]) -> tuple[Any, ...]:
    tables = [t for t in (_torch.parameters(module), _torch.buffers(module)) if t]
    return tuple(
        [
            None if t is None else (t.requires_grad, t.dtype, t.shape)
            for table in tables
            for k, t in table.items()
            if k not in without
        ]
    )


def parts(whole: Iterable[nn.Module], reads: Reads, written: Written) -> tuple[Part, ...]:
    """All modules in and below those that are called `whole`.

    What their own forward sets is left out, as are containers and objects that nothing has `reads` of in any module of
    the class: of equal modules only one was run.
    """
    found = {id(m): m for root in whole for m in root.modules()}
    ids: dict[type, list[nn.Module]] = {}
    for m in found.values():
        ids.setdefault(type(m), []).append(m)
    ignored: dict[type, frozenset[str]] = {}
    for kind, modules in ids.items():
        composite = frozenset[str]().union(*(fingerprint.composite(m) for m in modules))
        read = frozenset[str]().union(*(reads.of(m, composite) for m in modules))
        ignored[kind] = (composite - read) | {name for k, name in written if k is kind}
    return tuple(Part.of(m, ignored[type(m)]) for m in found.values())


class Weights:
    """Whether parameters whose numbers followed no pattern still follow none.

    Looked at again when they were written once, twice, 4, 8, 16... times since, which finds weights that are loaded
    after a first call and costs a training nothing; and after `load_state_dict` of the converted model, when told so.
    """

    def __init__(self, generic: Iterable[tuple[nn.Module, str]]) -> None:
        self.places = [(weakref.ref(module), name) for module, name in generic]
        self.versions, self.writes, self.due, self.plain = self._versions(), 0, False, True

    def _now(self) -> Sequence[Tensor | None]:
        return [None if (m := module()) is None else _torch.parameters(m).get(name) for module, name in self.places]

    def _versions(self) -> list[tuple[int, int]]:
        return [(0, 0) if p is None else (id(p), _torch.version(p)) for p in self._now()]

    def stand(self) -> bool:
        """Whether they do, as far as was looked."""
        if (now := self._versions()) != self.versions:
            self.versions, self.writes = now, self.writes + 1
            if self.due or self.writes & (self.writes - 1) == 0:
                self.due, self.plain = False, all(p is None or is_generic(p) for p in self._now())
        return self.plain
