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
import importlib.util
import logging
import os
import re
import shutil
import sysconfig
import threading
import weakref
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from revfx import _torch
from revfx.engine import dispatch
from revfx.engine.checkers import COMPARED, is_factory
from revfx.engine.forward import Forward, drops
from revfx.engine.match import HeldTensor
from revfx.engine.operators import STATISTICS, is_writer, written_positions
from revfx.engine.plan import Plan, UnitPlan
from revfx.engine.saved import SavedTensor
from revfx.engine.unit import Number, Slot, Unit, UnitOp
from revfx.engine.watch import Watching
from revfx.engine.wrappers import SavedWrapper
from revfx.errors import RevfxError
from revfx.layout import ALIGNED, ALIGNED_ELSEWHERE
from revfx.passes._torch import is_overload


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
        self.forward = Forward(plan)
        compiled = _compiled_plan(module, plan)
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


def _library_path() -> Path:
    """Return the file of the extension for these sources, this torch and this Python."""
    from torch.utils import cpp_extension

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
    from torch.utils import cpp_extension

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
        LOG.info("Building the native watcher for torch %s. This takes about 15 seconds.", torch.__version__)
        return cpp_extension.load(name, str(SOURCES[0]), ["-O2"], build_directory=str(folder), with_cuda=False)


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
    for line in lines:
        if "error:" in line:
            return line
    return lines[0].rstrip(".") if lines else ""


# --- units, as the extension takes them
MADE, FIRST_EXTERNAL, EXTERNAL, NUMBER, CONSTANT, LIST, ANY = range(7)  # kinds of arguments
IGNORED, EXTERNAL_RESULT, MADE_RESULT, MADE_AGAIN = range(4)  # kinds of results
NONE, SAME, DETACH, ALIAS, COPY = range(5)  # ways to hold a result
_plans: weakref.WeakKeyDictionary[Plan, tuple[Any, ...]] = weakref.WeakKeyDictionary()
_units: weakref.WeakKeyDictionary[UnitPlan, Any] = weakref.WeakKeyDictionary()


def _compiled_plan(module: Any, plan: Plan) -> Any:
    """Return a plan for the extension, compiled when it has learnt something."""
    known = _plans.get(plan)
    units = list(plan.units.values())
    paths = (plan.path, *plan.others)
    state = [(unit, unit.is_fallback) for unit in units], paths
    if known is not None and known[0] == state:
        return known[1]
    compiled = module.Plan()
    for unit_plan in units:
        if unit_plan not in _units:
            _units[unit_plan] = _compiled_unit(module, unit_plan.unit)
        if _units[unit_plan] is not None:
            compiled.add(unit_plan, _units[unit_plan])
    for path in plan.others:
        for unit_plan, first in zip(path.sequence, path.firsts, strict=False):
            compiled.begin_at(first, unit_plan)
    compiled.drop_at([*frozenset().union(*(path.dropped_at for path in paths))])
    _plans[plan] = state, compiled
    return compiled


def _compiled_unit(module: Any, unit: Unit) -> Any:
    """Return a unit for the extension; None if the native watcher can't see or compare one of its operators."""
    compiled = module.Unit(unit.slots, unit.numbers, drops(unit), unit.renamed, [*unit.read])
    generator = _Describer(unit)
    for number, op in enumerate(unit.ops):
        if not is_overload(op.func):
            return None
        try:
            compiled.add(*generator.describe(op), unit.rewritten(number))
        except (RuntimeError, TypeError, ValueError) as e:
            LOG.info("The native watcher leaves out %s: %s", unit, e)
            return None
    return compiled


Pattern = tuple[int, int, tuple[int, ...] | None, bool, Any]


class _Describer:
    """Describes the operators of a unit, in order; see `Checker` for the counterpart in Python."""

    def __init__(self, unit: Unit) -> None:
        self.unit = unit
        self.bound: set[int] = set()  # external slots that appeared
        self.done: set[int] = set()  # slots of results that were made
        self.cloned: list[int] = []  # external slots of the operator that are copied before it

    def describe(self, op: UnitOp) -> tuple[Any, ...]:
        """Return the arguments of the extension's `Unit.add`."""
        self.cloned = self._first_written(op)
        schema = op.func._schema
        arguments: list[Pattern | None] = []
        positions = iter(op.args)
        for argument in schema.arguments:
            # Python's handlers are given trailing arguments only if they differ from their defaults
            if argument.name in op.kwargs:
                arguments.append(self._argument(op.kwargs[argument.name]))
            elif argument.kwarg_only:
                arguments.append(None)
            else:
                given = next(positions, self)
                arguments.append(None if given is self else self._argument(given))
        results: list[Any] = []
        if any(slot >= 0 for slot in op.outs):
            for slot in op.outs:
                results.append(self._result(op, slot))
        return schema.name, schema.overload_name, arguments, results, op.is_single, op.state >= 0, self.cloned

    def _first_written(self, op: UnitOp) -> list[int]:
        """Return the external tensors that their first operator writes to, and that are read again."""
        found: list[int] = []
        for position, name in written_positions(op.func) if is_writer(op.func) else ():
            a = op.args[position] if position < len(op.args) else op.kwargs.get(name)
            if type(a) is Slot and a in self.unit.external & self.unit.read and a not in self.bound:
                found.append(int(a))
        return found

    def _argument(self, a: Any) -> Pattern:
        if type(a) is Slot:
            return self._slot(int(a))
        if type(a) is Number:
            return NUMBER, int(a), None, False, None
        if isinstance(a, (list, tuple)) and _has_slot(a):
            return LIST, -1, None, False, [self._argument(x) for x in a]
        return (CONSTANT if _is_compared(a) else ANY), -1, None, False, a

    def _slot(self, slot: int) -> Pattern:
        slot = self.unit.same.get(slot, slot)
        if slot not in self.unit.external:
            return MADE, slot, None, False, None
        if slot in self.bound:
            return EXTERNAL, slot, None, False, None
        self.bound.add(slot)
        if slot in self.unit.cloned:
            self.cloned.append(slot)
        return FIRST_EXTERNAL, slot, self.unit.shapes.get(slot), slot in self.unit.layouts, None

    def _result(self, op: UnitOp, slot: int) -> tuple[Any, ...]:
        unit = self.unit
        if slot in self.done:
            return MADE_AGAIN, slot, None, NONE, NONE, False
        if slot < 0 or slot in self.bound:
            return IGNORED, -1, None, NONE, NONE, False
        self.done.add(slot)
        if slot in unit.external:
            self.bound.add(slot)
            return EXTERNAL_RESULT, slot, None, NONE, NONE, False
        held = alive = NONE
        if slot in unit.held:
            held = COPY if slot in unit.cloned else DETACH if is_factory(op) else ALIAS
        elif slot in unit.alive:
            alive = DETACH if op.is_view else SAME
        return MADE_RESULT, slot, unit.shapes.get(slot), held, alive, slot in unit.layouts


def _is_compared(a: Any) -> bool:
    if isinstance(a, (list, tuple)):
        return bool(a) and all(map(_is_compared, a))
    return a is None or isinstance(a, COMPARED)


def _has_slot(values: Sequence[Any]) -> bool:
    return any(type(x) is Slot or (isinstance(x, (list, tuple)) and _has_slot(x)) for x in values)
