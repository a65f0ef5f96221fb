# pyright: reportPrivateUsage=false
"""Watching natively: the watcher of `watch.py` in C++, at a tenth of the time per operator.

Composite operators of torch run other operators while a dispatch mode is on: `reshape` calls `view` in the place of
`_reshape_alias`, `linear` calls `add` in the place of `add_`. So a forward that is to be watched natively has to be
learnt natively: `learner` takes care of that.

The extension is built for the installed torch when it is first needed. This takes about 15 seconds and a C++ compiler;
later processes load it from torch's folder of extensions. The watcher in Python takes its place if that fails.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import logging
import os
import re
import shutil
import sys
import sysconfig
import threading
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from revfx import _torch
from revfx.engine import dispatch
from revfx.engine.describe_units import compiled_plan
from revfx.engine.forward import Forward
from revfx.engine.match import HeldTensor
from revfx.engine.operators import STATISTICS
from revfx.engine.plan import Plan
from revfx.engine.saved import SavedTensor
from revfx.engine.watch import Watching
from revfx.engine.wrappers import SavedWrapper
from revfx.errors import RevfxError
from revfx.layout import ALIGNED, ALIGNED_ELSEWHERE


LOG = logging.getLogger("revfx")
SOURCES = [Path(__file__).parent / name for name in ("watch.cpp", "watch.h", "observe.h", "replay.h", "saved.h")]
CHOICE = "REVFX_WATCH"  # the environment variable: "native", "python", or empty for the native one where it is possible
Mode = TypeVar("Mode", bound=TorchDispatchMode)


def watcher(python: bool = False) -> type[Watching] | type[NativeWatching]:
    """Return the class that watches forwards.

    Args:
        python: take the one in Python, which sees compiled parts as operators.

    Raises:
        RevfxError: `REVFX_WATCH` asks for the native one, and it can't be built; or the variable has another value.
    """
    choice = os.environ.get(CHOICE, "")
    if choice not in ("", "native", "python"):
        raise RevfxError(f"{CHOICE} is {choice!r}. revfx does not know this watcher. Set it to `native` or `python`.")
    if python or choice == "python":
        return Watching
    if choice == "native":
        _library.get()
    return Watching if _library.load() is None else NativeWatching


def learner(mode: type[Mode], python: bool = False) -> type[Mode]:
    """Return the class that learns forwards for the watcher with the same `python`.

    Args:
        mode: a dispatch mode that learns.
        python: see `watcher`.
    """
    return mode if watcher(python) is Watching else _natively(mode)


def native_library() -> Any:
    """Return the extension, if forwards are watched natively; None else."""
    return None if watcher() is Watching else _library.get()


@cache
def _natively(mode: type[Mode]) -> type[Mode]:
    """Return a subclass of a dispatch mode that runs natively."""
    bases: Any = mode, NativeMode
    found: Any = type(f"Native{mode.__name__}", bases, {"__doc__": mode.__doc__, "__module__": mode.__module__})
    return found


class NativeMode(TorchDispatchMode):
    """A dispatch mode that torch does not know of: operators are those that run without any mode.

    Its handler is not given higher-order operators, but those that run inside of them.
    """

    def __enter__(self) -> Any:
        self._handler: Any = _library.get().Handler(self._handle)
        self._handler.enter()
        return self

    def __exit__(self, *error: Any) -> None:
        self._handler.exit()
        self._handler = None  # it holds this object

    @_torch.never_compiled
    def _handle(self, name: str, overload: str, args: Any, kwargs: Any) -> Any:
        return self.__torch_dispatch__(_overload(name, overload), (), args, kwargs)


@cache
def _overload(name: str, overload: str) -> Any:
    """Return an operator by the names of its schema."""
    namespace, _, packet = name.partition("::")
    return getattr(getattr(getattr(torch.ops, namespace), packet), overload or "default")


class NativeWatching:
    """Match the operators that run while it is entered; `forward` drops the saved tensors of units that match.

    It sees the operators of the thread that enters it.
    """

    def __init__(self, plan: Plan) -> None:
        module = _library.get()
        self.forward: Forward = Forward(plan)
        compiled = compiled_plan(module, plan)
        self._watcher: Any = module.Watcher(compiled, self.forward, SavedTensor, dispatch.is_wrapper, SavedWrapper)
        self._hooks: Any = dispatch.hooks_that_look_on(self._watcher.pack, module.unpack)

    def __enter__(self) -> NativeWatching:
        self._hooks.__enter__()
        self._watcher.enter()
        self._watcher.begin()
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            self._watcher.exit()
        finally:
            self._hooks.__exit__(*error)
            self._hooks = self._watcher = None
        self.forward.end()

    def is_innermost(self) -> bool:
        """As `Watching.is_innermost`."""
        return dispatch.has_innermost_hooks(self._watcher)

    def stop(self) -> None:
        """As `Watching.stop`."""
        self._watcher.stop()


# --- the extension
REMEDY = "Install a C++ compiler, ninja and the headers of Python"


class _Library:
    """The compiled extension, which a process loads once; `reason`: why there is none."""

    def __init__(self) -> None:
        self.module: Any = None
        self.reason = ""
        self._lock = threading.Lock()

    def load(self) -> Any:
        """Return the extension, built if need be; None if that is impossible."""
        if self.module is not None or self.reason:
            return self.module
        with self._lock:
            if self.module is not None or self.reason:
                return self.module
            try:
                module = _built()
                names = [(func._schema.name, func._schema.overload_name) for func in STATISTICS]
                module.install(ALIGNED, ALIGNED_ELSEWHERE, Tensor, nn.Parameter, HeldTensor, names)
                dispatch.pass_higher_order_operators()
            except Exception as e:  # of any class: from a compiler, a loader or another torch
                self.reason = _first_error(str(e)) or type(e).__name__
                LOG.warning(
                    "The native watcher is not available: %s. The one in Python costs about 10 us per operator."
                    " %s, or set %s to `python`.", self.reason, REMEDY, CHOICE,
                )  # fmt: skip
            else:
                self.module = module
        return self.module

    def get(self) -> Any:
        """Return the extension.

        Raises:
            RevfxError: it can't be built.
        """
        module = self.load()
        if module is None:
            raise RevfxError(
                f"The native watcher is not available: {self.reason}. revfx can't watch the forward natively."
                f" {REMEDY}, or set {CHOICE} to `python`."
            )
        return module


_library = _Library()


def _cpp_extension() -> Any:
    """Return torch's module of this name, without its warning of a missing CUDA runtime, which is not needed here."""
    log = logging.getLogger("torch.utils.cpp_extension")
    disabled, log.disabled = log.disabled, True
    try:
        return importlib.import_module(log.name)
    finally:
        log.disabled = disabled


def _library_path() -> Path:
    """Return the file of the extension for these sources, this torch and this Python."""
    cpp_extension = _cpp_extension()
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in SOURCES)).hexdigest()[:8]
    tag = re.sub(r"\W", "_", f"torch_{torch.__version__}_{sysconfig.get_config_var('SOABI') or ''}")
    name = f"revfx_watch_{digest}_{tag}"
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    return Path(root) / name / f"{name}{cpp_extension.LIB_EXT}"


def _built() -> Any:
    """Return the extension from torch's folder of extensions; build it if it is not there.

    Raises:
        Exception: it can't be built.
    """
    from filelock import FileLock  # torch requires it

    cpp_extension = _cpp_extension()
    library = _library_path()
    folder, name = library.parent, library.stem
    folder.mkdir(parents=True, exist_ok=True)
    # One process builds. The system ends this lock with its process; torch's own would stay, and block all others.
    with FileLock(folder.with_suffix(".lock")):
        if library.exists():
            with contextlib.suppress(ImportError):  # of a build that was cut off
                return _imported(name, library)
            library.unlink()
        _check_tools()
        (folder / "lock").unlink(missing_ok=True)
        _tell_of_build()
        return cpp_extension.load(name, str(SOURCES[0]), ["-O2"], build_directory=str(folder), with_cuda=False)


def _tell_of_build() -> None:
    """Tell the log that the extension is built, and a terminal too: nothing else shows there meanwhile."""
    LOG.info("Building the native watcher for torch %s. This takes about 15 seconds.", torch.__version__)
    if sys.stderr and sys.stderr.isatty():  # it may be closed
        text = f"revfx builds its watcher for torch {torch.__version__}, once. This takes about 15 seconds."
        print(text, file=sys.stderr, flush=True)


def _imported(name: str, library: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _check_tools() -> None:
    """Raise an error that names a missing tool."""
    compiler = os.environ.get("CXX", "c++").split()[0]
    for tool in (compiler, "ninja"):
        if shutil.which(tool) is None:
            raise FileNotFoundError(f"there is no `{tool}`")
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        raise FileNotFoundError(f"there is no {header}")


def _first_error(text: str) -> str:
    """Return the first error in the output of a compiler, or its first line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "error:" in line]
    return next(iter((*errors, *lines)), "").rstrip(".")
