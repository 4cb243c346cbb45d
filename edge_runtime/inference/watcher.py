"""Runs `python -m edge_runtime predict --watch` for the daemon, in a separate process.

A file that crashes the classifier therefore does not end the daemon. The process has low priority, and classifies while
the daemon trains.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from edge_runtime.inference.child_process import NICENESS, RESTART, ChildProcess
from fedfmsl.common.backoff import Backoff
from fedfmsl.protocol.messages import Prediction, first_error

__all__ = ["NICENESS", "Watcher"]

logger = logging.getLogger(__name__)


class Watcher(ChildProcess):
    """`on_prediction` runs in the watcher's thread."""

    def __init__(
        self,
        folder: Path,
        state: Path,
        bundle: Path,
        on_prediction: Callable[[Prediction], None],
        restart: Backoff = RESTART,
        questions: bool = False,
    ) -> None:
        """`questions`: also store what the device's page asks about."""
        arguments = ["predict", "--json", "--watch", str(folder), "--state", str(state), "--bundle", str(bundle)]
        arguments += ["--questions"] if questions else []
        super().__init__(f"the classifier of {folder}", arguments, self._on_output, restart)
        self._folder = folder
        self._on_prediction = on_prediction

    def _on_output(self, line: bytes) -> bool:
        try:
            prediction = Prediction.model_validate_json(line)  # with every class; published are those that fit
        except ValidationError as error:
            logger.warning(f"ignored an invalid line from the classifier of {self._folder}: {first_error(error)}")
            return False
        self._on_prediction(prediction)
        return True
