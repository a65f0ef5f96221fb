"""The plan for a budget as data and text: saved tensors by module, the peak, and the time of other budgets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from revfx.units import size


MAX_MODULES = 12  # in the table


@dataclass(frozen=True, slots=True)
class Share:
    """Bytes of a module's saved tensors: `kept`, `recomputed`, `compressed` to a bit an element, or `inverted`."""

    module: str
    kept: int
    recomputed: int
    compressed: int
    inverted: int

    @property
    def numbers(self) -> tuple[int, int, int, int]:
        """The bytes, in this order."""
        return self.kept, self.recomputed, self.compressed, self.inverted


@dataclass(frozen=True, slots=True)
class Point:
    """A budget in bytes, and the predicted time of the fastest plan within it, in plain steps."""

    budget: int
    time: float


@dataclass(frozen=True, slots=True)
class FitInfo:
    """The plan for a budget. Sizes are in bytes, and times in steps of the plain model.

    Attributes:
        budget: the budget that was asked for.
        plain: the peak of the plain model's step.
        is_feasible: a plan stays within the budget. Otherwise the other attributes describe the smallest plan.
        peak: the predicted peak.
        time: the predicted time.
        bound: a lower bound of the time of any plan with the same couplings inverted; None without scipy.
        modules: the saved tensors of each module, by choice.
        held: the tensors at the peak, largest first.
        curve: the times of other budgets.
        least: the least feasible budget.
    """

    budget: int
    plain: int
    is_feasible: bool
    peak: int
    time: float
    bound: float | None
    modules: tuple[Share, ...]
    held: tuple[str, ...]
    curve: tuple[Point, ...]
    least: int

    def lines(self) -> Iterator[str]:
        """Yield this as text."""
        if self.is_feasible:
            share = f"{self.peak / self.plain:.0%} of the plain model's {size(self.plain)}"
            time = f"{self.time:.2f} of its time"
            if self.bound is not None:
                time += f" (no plan of this kind takes less than {self.bound:.2f})"
            yield f"budget {size(self.budget)}: predicted peak {size(self.peak)}, {share}, at {time}"
            yield f"  {'':28}{'kept':>12}{'recomputed':>12}{'compressed':>12}{'inverted':>12}"
            rows = sorted(self.modules, key=lambda m: -sum(m.numbers))
            for m in rows[:MAX_MODULES]:
                numbers = "".join(f"{size(n) if n else '-':>12}" for n in m.numbers)
                yield f"  {m.module or 'the root':28}{numbers}"
            if len(rows) > MAX_MODULES:
                yield f"  and {len(rows) - MAX_MODULES} more modules"
            yield "at its peak"
        else:
            yield f"budget {size(self.budget)}: no plan stays within it"
            yield "at the peak of the smallest plan"
        yield from map("  {}".format, self.held)
        yield f"least feasible budget: {self.least} bytes, {size(self.least)}"
        yield "budgets and the time they cost, in plain steps"
        yield from (f"  {size(p.budget):>10}  {p.budget / self.plain:>4.0%}  {p.time:.3f}" for p in self.curve)
