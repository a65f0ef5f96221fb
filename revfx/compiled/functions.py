"""Functions of regions, and blocks of models, compiled one by one: the same kernels run in forward and backward.

So, unlike in a whole graph that is compiled, regenerated tensors are the forward's, bit for bit.
"""

from __future__ import annotations

import contextlib
import types
import warnings
from collections import defaultdict
from collections.abc import Callable, Generator, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from revfx import _torch
from revfx.parts import structure


LISTS = nn.ModuleList, nn.ModuleDict  # which have no forward


def compiler() -> types.ModuleType:
    """Return `_inductor`, imported late: it takes a second, and the compiler's warnings are none of the user's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from revfx.compiled import _inductor
    return _inductor


def with_own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that calls `function`, with a code object that no other has.

    Dynamo keeps compiled functions with the code object: models of one class would share its limit of recompilations,
    and keep each other's graphs alive.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return types.FunctionType(run.__code__.replace(), run.__globals__, run.__name__, None, run.__closure__)


class Kernels:
    """The compiled kernels of functions of one structure."""

    def __init__(self) -> None:
        # a size that is found to vary would give an earlier call's re-run other kernels than it had
        self.run: Callable[..., Any] = torch.compile(with_own_code(_torch.UNCOMPILED_CALL), dynamic=False)
        self.failed: str | None = None  # why the first that could not be compiled was not
        self.ran: dict[Hashable, bool] = {}  # each kind of call, and whether it could be compiled


class CompiledFunction:
    """`module(*args, **kwargs)`, compiled at its first call; as it is where the compiler can't take it."""

    def __init__(self, module: nn.Module, kernels: Kernels) -> None:
        self.module, self.kernels = module, kernels

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the result of the module. A kind of call that could not be compiled is not compiled in its replay."""
        kernels, kind = self.kernels, _call_kind(*args, *kwargs.values())
        known = kernels.ran.get(kind)
        if known is not False:
            try:
                with contextlib.nullcontext() if known else _quiet():
                    result = kernels.run(self.module, *args, **kwargs)
            except compiler().TorchDynamoException as e:  # dynamo's, or of a compiler below it
                kernels.ran[kind] = False
                kernels.failed = kernels.failed or str(e).strip().partition("\n")[0]
            else:
                kernels.ran[kind] = True
                return result
        return _torch.UNCOMPILED_CALL(self.module, *args, **kwargs)


def compile_blocks(model: nn.Module) -> list[tuple[str, str, CompiledFunction]]:
    """Return compiled calls of the members of a model's innermost lists that have modules of their own, each with the
    member's name and that of its class; those that are alike are compiled once. The model stays as it is.

    Raises:
        ValueError: there are none.
    """
    kernels, blocks = defaultdict[Any, Kernels](Kernels), {id(m) for m in _blocks(model)}
    if not blocks:
        text = f"`compile=True` compiles the blocks in a model's lists, and this {type(model).__name__} has none"
        raise ValueError(f"{text}: compile parts of it by `part.compile()` instead.")
    found: list[tuple[str, str, CompiledFunction]] = []
    for name, m in model.named_modules():
        if id(m) in blocks and not _torch.is_compiled(m):
            found.append((name, type(m).__name__, CompiledFunction(m, kernels[structure(m)])))
    return found


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    for m in module.children():
        inner = [*_blocks(m)]
        listed = isinstance(module, (*LISTS, nn.Sequential)) and not isinstance(m, LISTS) and any(m.children())
        yield from inner or [m] * listed


def _call_kind(*args: Any) -> Hashable:
    """Return a key that calls with the same kernels share."""
    tensors = ((a.shape, a.stride(), a.dtype, a.device, a.requires_grad) for a in args if isinstance(a, Tensor))
    return *tensors, torch.is_grad_enabled(), torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cpu")


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Return a context without the compiler's warning about tensors that are no leaves: streams are none."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor that is not a leaf")
        yield
