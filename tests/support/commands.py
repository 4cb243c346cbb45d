"""python tests/support/commands.py MODULE: commands of a module, one after the other in one process.

For commands that import torch and transformers, which takes longer than what they do. Each line of input is a JSON list
of arguments, and its answer a line with exit code, output and errors.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import TracebackType
from typing import Any


class Commands:
    """`run` is `python -m module arguments` in the common process."""

    def __init__(self, module: str, environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )

    def __enter__(self) -> Commands:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._process.communicate()

    def run(self, *arguments: str) -> tuple[int, str, str]:
        """Exit code, output and errors."""
        assert self._process.stdin and self._process.stdout
        print(json.dumps(arguments), file=self._process.stdin, flush=True)
        code, out, errors = json.loads(self._process.stdout.readline())
        return code, out, errors


def _serve(app: Any) -> None:
    answers = sys.stdout
    for line in sys.stdin:
        out, errors = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(errors):
            code = _exit_code(app, json.loads(line))
        print(json.dumps([code, out.getvalue(), errors.getvalue()]), file=answers, flush=True)


def _exit_code(app: Any, arguments: list[str]) -> object:
    try:
        app(arguments)
    except SystemExit as ended:
        return ended.code
    return 0


if __name__ == "__main__":
    sys.path[0] = str(Path.cwd())  # as with -m
    _serve(importlib.import_module(sys.argv[1]).app)
