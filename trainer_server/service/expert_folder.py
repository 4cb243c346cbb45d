"""RUN/global_expert/: the global expert as a PEFT adapter with its model card, as the newest rounds leave it."""

from __future__ import annotations

import logging
from pathlib import Path

from fedfmsl.algorithms.arrays import Vector
from fedfmsl.common.whole_folder import write_folder
from fedfmsl.protocol.messages import Stage
from trainer_server.coordinator.records import ClosedRound
from trainer_server.coordinator.state import Plan, State
from trainer_server.storage.expert_folder import expert_files
from trainer_server.storage.model_card import Result, result_of

logger = logging.getLogger(__name__)


class ExpertFolder:
    def __init__(self, plan: Plan, folder: Path) -> None:
        self._plan = plan
        self._folder = folder
        self._level = 0  # of the adapter in the folder
        self._result: Result | None = None  # the latest one

    def resumed(self, state: State, result: Result | None) -> None:
        """Writes the folder again: the server may have ended before it was written, or a power failure damaged it.
        `result`: the latest one."""
        self._result = result
        if state.start.size:
            self._level = state.sal.level
            self._write(state.expert)

    def round_closed(self, closed: ClosedRound, expert: Vector) -> None:
        """Writes the folder after rounds that change the global expert (P,), or that measure it."""
        announced = closed.round
        first = announced.stage is Stage.PERSONAL and announced.index == 0  # it may bring a former head back
        is_dropped = bool(closed.repeated)  # perhaps by a rollback
        changed = first or is_dropped or announced.stage in (Stage.GLOBAL, Stage.HEAD, Stage.UNMASK, Stage.CANARY)
        result = result_of(closed)
        self._result = result or self._result
        if announced.expert and changed:
            self._level = max(self._level, announced.level)  # with --secure a later round may be of a lower one
        if announced.expert and self._level and (changed or result):
            self._write(expert)

    def _write(self, expert: Vector) -> None:
        """A failure is logged."""
        plan = self._plan
        try:
            write_folder(self._folder, expert_files(plan.bundle, plan.config, expert, self._level, self._result))
        except OSError as error:
            logger.warning("%s could not be written (%s)", self._folder, error.strerror or error)
