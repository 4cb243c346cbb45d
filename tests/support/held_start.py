"""python tests/support/held_start.py GO MODULE ARGUMENTS…

Runs a module as `python -m` does, once the file GO exists. The time that its imports take is over then.
"""

from __future__ import annotations

import importlib
import runpy
import sys
import time
from pathlib import Path


def launcher(go: Path) -> tuple[str, ...]:
    """For `Processes.start_module`."""
    return (__file__, str(go))


if __name__ == "__main__":
    _, go, module, *arguments = sys.argv
    sys.path[0] = str(Path.cwd())  # as with -m
    sys.argv = [module, *arguments]
    importlib.import_module(module)
    while not Path(go).exists():
        time.sleep(0.01)
    runpy.run_module(module, run_name="__main__", alter_sys=True)
