"""RUN/global_expert/: the global expert as a PEFT adapter with its model card, as the newest rounds leave it."""

from __future__ import annotations

import logging
from pathlib import Path

from fedfmsl.algorithms.arrays import Vector
from fedfmsl.protocol.messages import Stage
from trainer_server.coordinator.records import ClosedRound
from trainer_server.coordinator.state import Plan
from trainer_server.storage.model_card import Result, result_of, write_card
from trainer_server.storage.peft_adapter import write_adapter

logger = logging.getLogger(__name__)


class ExpertFolder:
    def __init__(self, plan: Plan, folder: Path) -> None:
        self._plan = plan
        self._folder = folder
        self._result: Result | None = None  # the latest one

    def round_closed(self, closed: ClosedRound, expert: Vector) -> None:
        """Writes the adapter after rounds that change the global expert (P,), and the card after those that measure
        it. A failure is logged."""
        bundle, announced = self._plan.bundle, closed.round
        first = announced.stage is Stage.PERSONAL and announced.index == 0  # it may bring a former head back
        changed = first or announced.stage in (Stage.GLOBAL, Stage.HEAD, Stage.UNMASK, Stage.CANARY)
        result = result_of(closed)
        self._result = result or self._result
        try:
            if announced.expert and changed:
                write_adapter(bundle, expert[: bundle.expert.size(announced.level)], announced.level, self._folder)
            if announced.expert and (changed or result):
                write_card(self._folder, bundle, self._plan.config, self._result)
        except (OSError, ValueError) as error:  # ValueError: a power failure has damaged a file of the folder
            reason = getattr(error, "strerror", None) or error
            logger.warning("the adapter of round %d could not be written (%s)", announced.round, reason)
