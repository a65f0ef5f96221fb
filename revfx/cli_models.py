"""The model and the inputs that a command line names; only the file that it names is run."""

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
    """Return the module that `FILE.py:FACTORY` names and its inputs, of the given shapes or from the factory.

    Raises:
        WrongArguments: no such file or name, or something that is no module; a wrong shape or dtype.
        RevfxError: the file, or the factory, raised.
    """
    file, colon, name = spec.rpartition(":")
    if not colon or not file:
        raise WrongArguments(f"{spec!r}: give a file and a name in it, such as model.py:make_model")
    given = tuple(tensor(text, dtype) for text in shapes)
    made = _build(_module(Path(file)), file, name)
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, given)
    if not isinstance(model, nn.Module):
        raise WrongArguments(f"{spec}: it gives a {type(model).__name__}, not a torch.nn.Module")
    inputs = given or (tuple(inputs) if isinstance(inputs, (list, tuple)) else (inputs,))
    if not inputs:
        raise WrongArguments(f"{spec}: give the shapes of its inputs, such as --input 8,3,32,32")
    return model, inputs


def tensor(text: str, dtype: str) -> Tensor:
    """Return an input for `8,3,32,32` or `16,64:int64`: normal random numbers, zeros where they are whole."""
    numbers, _, own = text.partition(":")
    kind = getattr(torch, own or dtype, None)
    if not isinstance(kind, torch.dtype):
        raise WrongArguments(f"{own or dtype!r} is no dtype of torch; float32, bfloat16 and int64 are such")
    try:
        shape = [int(n) for n in numbers.split(",")] if numbers else []
    except ValueError:
        raise WrongArguments(f"--input {text}: give whole numbers, such as 8,3,32,32 or 16,64:int64") from None
    if any(n < 0 for n in shape):
        raise WrongArguments(f"--input {text}: sizes can't be negative")
    return torch.randn(shape, dtype=kind) if kind.is_floating_point else torch.zeros(shape, dtype=kind)


def _module(file: Path) -> ModuleType:
    if not file.is_file():
        raise WrongArguments(f"{file}: no such file")
    name = f"revfx_model_{file.stem}"  # it takes no other module's place
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise WrongArguments(f"{file}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # for dataclasses and pickling
    # The file and its factory may import modules beside it: after the standard library, which torch imports late.
    installed = sysconfig.get_path("purelib")
    at = sys.path.index(installed) if installed in sys.path else len(sys.path)
    sys.path.insert(at, str(file.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except Exception as e:
        raise RevfxError(f"{file} raised {type(e).__name__}: {e}") from e
    return module


def _build(module: ModuleType, file: str, name: str) -> Any:
    if not hasattr(module, name):
        names = [n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__]
        raise WrongArguments(f"{file} has no `{name}`" + (f"; it has {', '.join(names)}" if names else ""))
    found: Any = getattr(module, name)
    if isinstance(found, nn.Module) or not callable(found):
        return found
    try:
        return found()
    except Exception as e:
        raise RevfxError(f"{file}:{name}() raised {type(e).__name__}: {e}") from e
