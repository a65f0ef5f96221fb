"""Functions of regions, and blocks of models, compiled one by one: the same kernels run in forward and backward.

So regenerated tensors are the forward's, bit for bit, unlike in a graph that is compiled as a whole.
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


CONTAINER_MODULES = nn.ModuleList, nn.ModuleDict  # without a forward


def import_compiler() -> types.ModuleType:
    """Import `_inductor`, which takes a second, without the compiler's warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from revfx.compiled import _inductor
    return _inductor


def with_own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that calls `function`, with a code object of its own.

    Dynamo keeps compiled functions by code object. Models that share one would share its limit of recompilations, and
    keep each other's graphs alive.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return types.FunctionType(run.__code__.replace(), run.__globals__, run.__name__, None, run.__closure__)


class Kernels:
    """The compiled kernels of functions of one structure."""

    def __init__(self) -> None:
        # Static sizes: if a size became dynamic, the recomputation of an earlier call would run other kernels.
        self.run: Callable[..., Any] = torch.compile(with_own_code(_torch.UNCOMPILED_CALL), dynamic=False)
        self.failed: str | None = None  # the reason of the first failure
        self.is_compiled: dict[Hashable, bool] = {}  # by kind of call


class CompiledFunction:
    """`module(*args, **kwargs)`, compiled at its first call; uncompiled if the compiler fails."""

    def __init__(self, module: nn.Module, kernels: Kernels) -> None:
        self.module: nn.Module = module
        self.kernels: Kernels = kernels

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the result of the module. A call that could not be compiled is not compiled in its replay either."""
        kernels, kind = self.kernels, _call_kind(*args, *kwargs.values())
        is_compiled = kernels.is_compiled.get(kind)
        if is_compiled is not False:
            try:
                with contextlib.nullcontext() if is_compiled else _without_leaf_warning():
                    result = kernels.run(self.module, *args, **kwargs)
            except import_compiler().TorchDynamoException as e:  # dynamo's, or of a compiler that it calls
                kernels.is_compiled[kind] = False
                kernels.failed = kernels.failed or str(e).strip().partition("\n")[0]
            else:
                kernels.is_compiled[kind] = True
                return result
        return _torch.UNCOMPILED_CALL(self.module, *args, **kwargs)


def compile_blocks(model: nn.Module) -> list[tuple[str, str, CompiledFunction]]:
    """Return compiled calls of a model's blocks, each with the block's name and that of its class.

    Blocks are the members of the innermost lists that have modules of their own. Equal ones share their kernels. The
    model is not changed.

    Raises:
        ValueError: there are no blocks.
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
    is_list = isinstance(module, (*CONTAINER_MODULES, nn.Sequential))
    for m in module.children():
        inner = [*_blocks(m)]
        if inner:
            yield from inner
        elif is_list and not isinstance(m, CONTAINER_MODULES) and any(m.children()):
            yield m


def _call_kind(*args: Any) -> Hashable:
    """Return a key of the kernels that a call runs."""
    tensors = ((a.shape, a.stride(), a.dtype, a.device, a.requires_grad) for a in args if isinstance(a, Tensor))
    return *tensors, torch.is_grad_enabled(), torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cpu")


@contextlib.contextmanager
def _without_leaf_warning() -> Generator[None]:
    """Open a context without the compiler's warning about tensors that are not leaves, as streams."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor that is not a leaf")
        yield
