"""`ReversiblePartitioner`: torch's min-cut partitioner on a joint graph whose reversible regions are regenerated."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Generator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from torch import fx

import revfx
from revfx import _compile, rules
from revfx.errors import NotReversibleError
from revfx.passes.partition import Options, Report, rewrite


_listeners: ContextVar[tuple[list[Report], ...]] = ContextVar("revfx_reports", default=())


@contextlib.contextmanager
def reports() -> Generator[list[Report]]:
    """A context that gives a list of what was found in each graph compiled inside it (not of graphs out of a cache)."""
    found: list[Report] = []
    token = _listeners.set((*_listeners.get(), found))
    try:
        yield found
    finally:
        _listeners.reset(token)


class ReversiblePartitioner(_compile.CustomPartitionerFn):
    """A partitioner for `torch.compile(model, options={"custom_partitioner_fn": ReversiblePartitioner()})`.

    It finds runs of reversible couplings in the joint graph, regenerates their activations in the backward from their
    last ones, and lets `min_cut_rematerialization_partition` split the result. A graph without any is split as torch
    would have.

    Args:
        unbounded: what to do with couplings whose factor may underflow, such as `exp(s)`: "assert" checks the factor in
            every forward and raises where it came too near to zero; "store" keeps these couplings' inputs.
        tolerance: what rounding may grow to between two kept cuts (relative); None: sqrt(eps) of the dtype.
        strict: raise NotReversibleError for a graph that is left as it was, with the reason.
    """

    def __init__(self, unbounded: str = "assert", tolerance: float | None = None, strict: bool = False) -> None:
        if unbounded not in ("assert", "store"):
            raise ValueError(f"`unbounded={unbounded!r}` is not known; use 'assert' or 'store'.")
        self.options = Options(unbounded, tolerance)
        self.strict = strict

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        """The forward and the backward graph."""
        return self.partition(gm, joint_inputs, _compile.inductor_decompositions(), **kwargs)

    def partition(
        self,
        gm: fx.GraphModule,
        joint_inputs: Sequence[object],
        decompositions: Mapping[Any, Callable[..., Any]],
        **kwargs: Any,
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        """As `__call__`, for a graph traced with these `decompositions`."""
        static = kwargs.get("static_lifetime_input_indices") or ()
        with _compile.merged_once(gm):
            report = rewrite(gm.graph, kwargs["num_fwd_outputs"], static, decompositions, self.options)
            for listener in _listeners.get():
                listener.append(report)
            if self.strict and not report.regions:
                reasons = "\n  ".join(map(str, report.refusals[:8])) or "no operation is inverted"
                raise NotReversibleError(f"a compiled graph is left as it was:\n  {reasons}")
            gm.recompile()
            return _compile.min_cut_partition(gm, joint_inputs, **kwargs)

    def uuid(self) -> str:
        """What the compile caches are keyed with: this package's files, the options, and no rules but its own."""
        if rules.has_foreign():
            raise _compile.BypassCache("revfx: rules were registered by the user")
        return f"{_files()}-{self.options}-{self.strict}"


def _files() -> str:
    """A hash of the package's files."""
    digest = hashlib.sha256(revfx.__version__.encode())
    for folder in sorted(revfx.__path__):
        for file in sorted(Path(folder).glob("**/*.py")) if (Path(folder) / "rules.py").exists() else ():
            digest.update(file.read_bytes())
    return digest.hexdigest()
