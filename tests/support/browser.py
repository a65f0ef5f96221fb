"""A headless browser, for what only one can tell: what a page is once its script has run."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest


NAMES = ("chromium", "chromium-browser", "google-chrome")
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--virtual-time-budget=3000",
)  # fmt: skip


@dataclass(frozen=True)
class Visit:
    """The document once scripts have run, and what the browser had to say."""

    document: str
    log: str


def browser() -> str:
    """The path of a browser; without one the test is skipped, or fails where one is required."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        if os.environ.get("REVFX_BROWSER") == "required":
            pytest.fail(f"REVFX_BROWSER=required, and there is none of {', '.join(NAMES)}")
        pytest.skip("no browser")
    return found


def visit(page: Path, profile: Path, fragment: str = "", *options: str) -> Visit:
    """A page as a browser sees it, with `fragment` after its address."""
    address = page.as_uri() + (f"#{fragment}" if fragment else "")
    command = [browser(), *QUIET, f"--user-data-dir={profile}", "--enable-logging=stderr", "--v=0", *options]
    done = subprocess.run([*command, "--dump-dom", address], capture_output=True, text=True, check=True, timeout=120)
    return Visit(done.stdout, done.stderr)
