"""On which side of their kinks operations stand, and whether they stand there when they run again.

What is found of ties before a model runs holds for the ways that are known in which numbers become equal. So in some
calls of a region (the first, second, 4th, 8th... of its plan: what makes ties is in the model) some elements of what
its functions compare are looked at too. Not which of several equal elements a maximum picks: each has the same right
to the gradient.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from revfx.errors import RegenerationError
from revfx.passes import names
from revfx.passes._torch import is_real, outside_modes
from revfx.passes.grid import packed, unpacked
from revfx.passes.numbers import some_of


MOST = 1024  # steps of a region, evenly spread, so that memory stays flat
SAMPLE = 256  # elements of each operation
CHANCE, FEW = 2, 0.01  # the number, and the share, of them that may come to stand elsewhere; in half precision more do

Taken = tuple[Tensor, ...]


def _clamped(x: Any, min: Any = None, max: Any = None) -> Taken:
    return tuple(side(x, bound) for side, bound in ((torch.ge, min), (torch.le, max)) if bound is not None)


def _shrunk(x: Any, at: float = 0.5) -> Taken:
    return x > at, x < -at


def _odd(x: Any) -> Taken:
    """Return whether whole numbers are odd: a step to the next one shows."""
    return (x.remainder(2) == 1,)


def _cast(x: Any, *, dtype: torch.dtype | None = None, **_: Any) -> Taken:
    return () if dtype is None or dtype.is_floating_point or dtype.is_complex else _odd(x.trunc())


SIDES: Mapping[str, Callable[..., Taken]] = {
    **dict.fromkeys("relu leaky_relu elu _prelu_kernel".split(), lambda x, *_: (x > 0,)),
    **dict.fromkeys("abs sgn sign".split(), lambda x: (x > 0, x < 0)),
    **dict.fromkeys("eq ne lt le gt ge maximum minimum fmax fmin".split(), lambda a, b: (a > b, a < b)),
    **dict.fromkeys("clamp clamp_min".split(), _clamped),
    "clamp_max": lambda x, max: (x <= max,),
    **dict.fromkeys("hardswish hardsigmoid".split(), lambda x: (x > -3, x < 3)),
    **dict.fromkeys("softshrink hardshrink".split(), _shrunk),
    **dict.fromkeys("remainder fmod floor_divide".split(), lambda a, b: _odd(torch.floor(a / b))),
    "hardtanh": lambda x, low=-1, high=1: (x > low, x < high),
    "threshold": lambda x, at, _: (x > at,),
    "floor": lambda x: _odd(x.floor()),
    "ceil": lambda x: _odd(x.ceil()),
    "round": lambda x, *, decimals=0: _odd((x * 10.0**decimals).round()),
    "trunc": lambda x: _odd(x.trunc()),
    "_to_copy": _cast,
}


class _Mode(TorchDispatchMode):
    """Notes the sides of what runs, in its order."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, Taken]] = []

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Return True: what is compiled inside a function stays so, and is not looked into."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = names.bare(func.overloadpacket.__name__)
        if name in SIDES and (sides := _sides(name, args, kwargs)):  # before it may write to its operand
            self.seen.append((name, sides))
        return func(*args, **kwargs)


def _sides(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Taken:
    """Return on which sides some elements of the operands stand; nothing where numbers can't be read."""
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
    if not all(map(_can_be_read, tensors)) or not any(t.is_floating_point() for t in tensors):
        return ()
    with outside_modes():  # which would count or trace this
        wholes = torch.broadcast_tensors(*tensors)
        some = {id(t): some_of(whole, SAMPLE) for t, whole in zip(tensors, wholes, strict=True)}
        return SIDES[name](*(some.get(id(a), a) for a in args), **{k: some.get(id(a), a) for k, a in kwargs.items()})


def _can_be_read(t: Tensor) -> bool:
    """Return whether elements of `t` can be taken and compared."""
    plain = is_real(t) and t.layout == torch.strided and not t.is_nested and not t.is_quantized
    return plain and t.numel() > 0 and not t.is_complex() and (not t.is_floating_point() or t.dtype.itemsize > 1)


class BranchSamples:
    """Those of the operations inside the functions of one call of a region, in as many of its steps as it `watches`.

    `calls` says the how many-th call it is, 0 for none; `dtypes` are those of the streams, `eps` that of the narrowest
    dtype that autocast uses, or 0.
    """

    def __init__(self, calls: int, steps: int, dtypes: Iterable[torch.dtype], eps: float) -> None:
        self.every = max(1, steps // MOST) if calls > 0 and calls & (calls - 1) == 0 else 0
        eps = max(eps, *(torch.finfo(d).eps for d in dtypes if d.is_floating_point), 0.0)
        self.most = FEW + 4 * eps**0.5
        self.seen: dict[int, list[tuple[str, Taken]]] = {}

    def watches(self, step: int) -> bool:
        """Return whether a step's functions are looked into."""
        return self.every > 0 and step % self.every == 0

    @contextlib.contextmanager
    def noted(self, op: int) -> Generator[None]:
        """Return a context in which operation `op` runs in the forward, and is looked into."""
        with _Mode() as mode:
            yield
        with outside_modes():
            seen = [(kind, tuple([packed(side, 1) for side in sides])) for kind, sides in mode.seen]
        if seen:
            self.seen[op] = seen

    @contextlib.contextmanager
    def compared(self, op: int, name: str) -> Generator[None]:
        """Return a context in which operation `op` runs again.

        Raises:
            RegenerationError: more elements stand on another side than rounding moves by chance.
        """
        before = self.seen.get(op)
        if before is None:
            yield
            return
        with _Mode() as mode:
            yield
        if [kind for kind, _ in before] != [kind for kind, _ in mode.seen]:
            return  # what it compares depends on its numbers, or was kept since
        for (kind, then), (_, now) in zip(before, mode.seen, strict=True):
            with outside_modes():
                moved = max(_moved(a, b) for a, b in zip(then, now, strict=True))
            if moved > CHANCE + self.most * now[0].numel():
                raise RegenerationError(
                    f"{name}: `{kind}` compares numbers that rounding moves to its other side: {moved} of the"
                    f" {now[0].numel()} looked at stood elsewhere when it was run again for the backward, so that"
                    " gradients would be wrong. They are equal but for rounding, or the layers before amplify it. Use"
                    " `exact=True` or anchors (`anchor_every`), or keep its activations with"
                    " `revfx.testing.store_activations()`."
                )


def _moved(then: Tensor, now: Tensor) -> int:
    """Return how many elements stand elsewhere than when they were packed; 0 where they are others."""
    same = then.shape == packed(now, 1).shape
    return int((unpacked(then, 1, now).bool() != now).sum()) if same else 0
