"""`ReversiblePartitioner`: torch's min-cut partitioner on a joint graph with regenerated reversible regions."""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import logging
from collections.abc import Generator, Sequence
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import fx

import revfx
from revfx import _torch, passes, rules
from revfx.ambient import set_variable
from revfx.compiled import _inductor
from revfx.errors import NotReversibleError, list_refusals
from revfx.passes.facts import Facts, facts_of
from revfx.passes.joint.aliases import save_bases
from revfx.passes.joint.borders import STEP
from revfx.passes.joint.regenerate import RewriteOptions
from revfx.passes.joint.rewrite import Report, rewrite


MAX_LOGGED_REFUSALS = 3  # of one graph
_log = logging.getLogger("revfx")
_listeners: ContextVar[tuple[list[Report], ...]] = ContextVar("revfx_reports", default=())


@contextlib.contextmanager
def reports() -> Generator[list[Report]]:
    """Open a context with a list of the findings in each graph that is compiled in it (not from a cache)."""
    found: list[Report] = []
    with set_variable(_listeners, (*_listeners.get(), found)):
        yield found


class ReversiblePartitioner(_inductor.CustomPartitionerFn):
    """A partitioner for `torch.compile(model, options={"custom_partitioner_fn": ReversiblePartitioner()})`.

    It finds runs of reversible couplings in the joint graph, and regenerates their activations in the backward from the
    last ones. `min_cut_rematerialization_partition` splits the result, and any graph without couplings as well. If a
    saved tensor shares the storage of an input or output, writes to it before the backward raise an error. The logger
    "revfx" reports each graph at the level INFO.

    The inputs of a coupling are kept if a factor can come near zero, such as `exp(s)`. Cuts are kept if rounding would
    grow beyond the square root of the dtype's eps between them.

    Args:
        strict: raise NotReversibleError for a graph that is left as it was, with the reason.
    """

    def __init__(self, *, strict: bool = False) -> None:
        if not isinstance(strict, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"`strict={strict!r}` must be True or False.")
        self.options: RewriteOptions = RewriteOptions()
        self.strict = strict
        self.facts: Facts | None = None  # about the values of the compiled function's inputs, if they are known

    def with_facts_of(self, inputs: Sequence[Any]) -> ReversiblePartitioner:
        """Return a partitioner with facts about a graph's inputs, as far as they are real tensors."""
        other = copy.copy(self)
        other.facts = facts_of(inputs)
        return other

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        """Return the forward and the backward graph, for inductor."""
        _inductor.fuse_neighbours_only(STEP)
        options = replace(
            self.options, decompositions=_inductor.select_decomp_table(), stored=_inductor.storing_identity()
        )
        return self.partition(gm, joint_inputs, options, **kwargs)

    def partition(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], options: RewriteOptions | None = None, **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        """Return the forward and the backward graph.

        Args:
            gm: the joint graph.
            joint_inputs: its inputs.
            options: of the rewrite, as the inner compiler needs them; default: the partitioner's own.
            kwargs: arguments of torch's partitioner.
        """
        static = kwargs.get("static_lifetime_input_indices") or ()
        with _inductor.merge_equal_nodes(gm):
            with _torch.pause_collector():
                report = rewrite(gm.graph, kwargs["num_fwd_outputs"], static, options or self.options, self.facts)
            for listener in _listeners.get():
                listener.append(report)
            if _log.isEnabledFor(logging.INFO):
                _log.info("a compiled graph: %s", _log_line(report))
            if self.strict and not report.regions:
                text = f"a compiled graph is left as it was:\n{list_refusals(report.refusals)}"
                raise NotReversibleError(text, refusals=report.refusals)
            gm.recompile()
            halves = _inductor.min_cut_partition(gm, joint_inputs, bool(report.regions), **kwargs)
        save_bases(halves[0].graph, halves[1].graph, kwargs["num_fwd_outputs"])
        for half in halves:
            half.recompile()
        return halves

    def uuid(self) -> str:
        """Return the key for compile caches: files of revfx, options and facts; raise if the user added rules."""
        if rules.has_foreign():
            raise _inductor.BypassFxGraphCache("revfx: rules were registered by the user")
        return f"{_hash_files()}-{self.options}-{self.strict}-{self.facts}"


def _log_line(report: Report) -> str:
    """Return the log's line for one graph."""
    found = "; ".join(map(str, report.regions)) or "nothing"
    left = "; ".join(map(str, report.refusals[:MAX_LOGGED_REFUSALS])) or "nothing"
    return f"reversible: {found} | left as it was: {left} ({len(report.refusals)} in all)"


@functools.cache
def _hash_files() -> str:
    """Return a hash of the package's files; `passes` is another folder in a source tree."""
    digest = hashlib.sha256(revfx.__version__.encode())
    for package in (revfx, passes):
        for file in sorted(Path(str(package.__file__)).parent.rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()
