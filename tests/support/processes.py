"""Processes of torch.distributed, forked from one that has imported torch, which takes seconds."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path

from torch.multiprocessing.spawn import start_processes


IMPORTED = ["distributed_cases", "compiled_distributed_cases"]


def run_in_processes(work: Callable[[int, int, str], None], world: int, folder: Path) -> None:
    """Run `work(rank, world, folder)` in `world` processes, until all have returned."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(IMPORTED)
    start_processes(work, (world, str(folder)), nprocs=world, start_method="forkserver")
