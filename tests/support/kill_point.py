"""python tests/support/kill_point.py MODULE:NAME before|after CALL ARMED MODULE_TO_RUN ARGUMENTS…

Runs a module as `python -m` does, in a process that SIGKILLs itself before or after the CALL-th call (from 1) of a
function or method. If ARMED is not "", only calls since that file exists count. A function that another module imports
by name is called under that module's name. A message that the function has published, or receives as an argument, is
first acknowledged by the broker.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
import operator
import os
import runpy
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

import paho.mqtt.client as paho

DELIVERY_SECONDS = 10.0


def launcher(point: str, when: str, call: int = 1, armed: Path | None = None) -> tuple[str, ...]:
    """For `Processes.start_module`."""
    return (__file__, point, when, str(call), str(armed or ""))


def arm(point: str, when: str, call: int, armed: Path | None = None) -> None:
    """Replaces the function with one that kills the process at that call. Raises LookupError, AttributeError or
    ImportError if there is no such function."""
    if when not in ("before", "after"):
        raise LookupError(f"{when!r}: before or after a call?")
    module, _, path = point.partition(":")
    parent, _, name = path.rpartition(".")
    holder: Any = importlib.import_module(module)
    if parent:
        holder = operator.attrgetter(parent)(holder)
    function: Callable[..., Any] = getattr(holder, name)
    calls = itertools.count(1)

    @functools.wraps(function)
    def last(*args: Any, **kwargs: Any) -> Any:
        now = (armed is None or armed.exists()) and next(calls) == call
        if now and when == "before":
            die_after_delivery(args)
        result = function(*args, **kwargs)
        if now:
            die_after_delivery([result])
        return result

    static = isinstance(inspect.getattr_static(holder, name), staticmethod)
    setattr(holder, name, staticmethod(last) if static else last)


def die_after_delivery(values: Iterable[object]) -> NoReturn:
    for value in values:
        if isinstance(value, paho.MQTTMessageInfo):
            value.wait_for_publish(DELIVERY_SECONDS)
    die()


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable after SIGKILL")


if __name__ == "__main__":
    _, point, when, call, armed, module, *arguments = sys.argv
    sys.path[0] = str(Path.cwd())  # as with -m
    sys.argv = [module, *arguments]
    arm(point, when, int(call), Path(armed) if armed else None)
    runpy.run_module(module, run_name="__main__", alter_sys=True)
