"""What a long run of random programs says in the terminal: a line per part that is done, and the figures at the end."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest


PROPERTY = "programs"


class Reporter:
    """A plugin that adds up what the parts of a long run recorded, in whichever process they ran."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.totals: dict[str, Counter[str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a program, and show the progress of the run."""
        figures: Any = dict(report.user_properties).get(PROPERTY)
        terminal: Any = self.config.pluginmanager.get_plugin("terminalreporter")
        if report.when != "call" or figures is None or terminal is None:
            return
        self.totals.setdefault(figures["way"], Counter()).update(figures["counts"])
        done = sum(c["programs"] for c in self.totals.values())
        failed = sum(c["failure"] for c in self.totals.values())
        terminal.write_line(f" {done} programs, failures = {failed} ({figures['way']}, seed {figures['seed']})")

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Print the figures of each way."""
        if not self.totals:
            return
        seed = self.config.getoption("programs_seed")
        terminalreporter.section(f"random programs, --programs-seed {seed}")
        for way, counts in self.totals.items():
            rest = {k: n for k, n in counts.items() if k not in ("programs", "found", "failure")}
            terminalreporter.write_line(
                f"{way}: {counts['programs']} programs, {counts['found']} with regions, failures = {counts['failure']}"
            )
            for kind, n in sorted(rest.items(), key=lambda item: -item[1]):
                terminalreporter.write_line(f"    {n:6} {kind}")
