"""`python examples/bench`: see `run.py`."""

from __future__ import annotations

import os
import sys
from pathlib import Path


os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler would report its start and stop on stderr
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the folder of the package `bench`, not the package itself

from bench.run import main  # noqa: E402


sys.exit(main())
