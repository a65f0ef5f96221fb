"""Loading the model and the inputs that a command line names; it runs no other file."""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from revfx.errors import RevfxError


class WrongArguments(RevfxError):
    """The arguments of a command are wrong: exit status 2."""


def load(spec: str, shapes: Sequence[str], dtype: str) -> tuple[nn.Module, tuple[Any, ...]]:
    """Load the module that `FILE.py:FACTORY` names, and its inputs.

    Args:
        spec: `FILE.py:FACTORY`; the factory gives a module, or a pair of a module and its inputs.
        shapes: the inputs as texts, see `tensor`; they replace the factory's.
        dtype: the dtype of inputs without their own.

    Raises:
        WrongArguments: no such file or name, or no module; a wrong shape or dtype.
        RevfxError: the file, or the factory, raised.
    """
    file, colon, name = spec.rpartition(":")
    if not colon or not file:
        raise WrongArguments(f"{spec!r}: give a file and a name in it, such as model.py:make_model")
    tensors = tuple(tensor(text, dtype) for text in shapes)
    model, inputs = _build(_import_file(Path(file)), file, name), ()
    if isinstance(model, tuple) and len(model) == 2:
        model, inputs = model
    if not isinstance(model, nn.Module):
        raise WrongArguments(f"{spec}: it gives a {type(model).__name__}, not a torch.nn.Module")
    if not isinstance(inputs, (list, tuple)):
        inputs = (inputs,)
    if not tensors and not inputs:
        raise WrongArguments(f"{spec}: give the shapes of its inputs, such as --input 8,3,32,32")
    return model, tensors or tuple(inputs)


def tensor(text: str, dtype: str) -> Tensor:
    """Return an input for a text like `8,3,32,32` or `16,64:int64`: normal random numbers, or integer zeros."""
    numbers, _, own_dtype = text.partition(":")
    kind = getattr(torch, own_dtype or dtype, None)
    if not isinstance(kind, torch.dtype):
        raise WrongArguments(f"{own_dtype or dtype!r} is no dtype of torch; float32, bfloat16 and int64 are such")
    try:
        shape = [int(n) for n in numbers.split(",")] if numbers else []
    except ValueError:
        raise WrongArguments(f"--input {text}: give whole numbers, such as 8,3,32,32 or 16,64:int64") from None
    if any(n < 0 for n in shape):
        raise WrongArguments(f"--input {text}: sizes can't be negative")
    if kind.is_floating_point:
        return torch.randn(shape, dtype=kind)
    return torch.zeros(shape, dtype=kind)


def _import_file(file: Path) -> ModuleType:
    if not file.is_file():
        raise WrongArguments(f"{file}: no such file")
    name = f"revfx_model_{file.stem}"  # it takes no other module's place
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise WrongArguments(f"{file}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # for dataclasses and pickling
    # The file and its factory may import modules beside it. Their folder comes after the standard library, which torch
    # imports in part later.
    installed = sysconfig.get_path("purelib")
    position = sys.path.index(installed) if installed in sys.path else len(sys.path)
    sys.path.insert(position, str(file.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except Exception as e:
        raise RevfxError(f"{file} raised {type(e).__name__}: {e}") from e
    return module


def _build(module: ModuleType, file: str, name: str) -> Any:
    if not hasattr(module, name):
        names: list[str] = []
        for own_name, value in vars(module).items():
            if callable(value) and getattr(value, "__module__", "") == module.__name__:
                names.append(own_name)
        candidates = f"; it has {', '.join(names)}" if names else ""
        raise WrongArguments(f"{file} has no `{name}`{candidates}")
    found: Any = getattr(module, name)
    if isinstance(found, nn.Module) or not callable(found):
        return found
    try:
        return found()
    except Exception as e:
        raise RevfxError(f"{file}:{name}() raised {type(e).__name__}: {e}") from e
