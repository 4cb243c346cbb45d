"""Carries out the commands of the coordinator: what the server publishes and logs."""

from __future__ import annotations

import logging

from trainer_server.coordinator.announce import announcement
from trainer_server.coordinator.events import (
    AnnounceRound,
    Command,
    CountRefusal,
    Log,
    PublishGlobals,
    SendAck,
    Stop,
    StoreRound,
)
from trainer_server.coordinator.state import Plan, State
from trainer_server.service.expert_folder import ExpertFolder
from trainer_server.service.floods import FloodGuard
from trainer_server.service.publisher import Publisher
from trainer_server.service.refusals import Refusals
from trainer_server.service.run_log import log_participation, log_round, log_stragglers
from trainer_server.storage.run_store import RunStore

logger = logging.getLogger(__name__)


class Executor:
    def __init__(
        self,
        plan: Plan,
        store: RunStore,
        publisher: Publisher,
        refusals: Refusals,
        floods: FloodGuard,
        expert_folder: ExpertFolder,
    ) -> None:
        self._plan = plan
        self._store = store
        self._publisher = publisher
        self._refusals = refusals
        self._floods = floods
        self._expert_folder = expert_folder

    def execute(self, command: Command, state: State) -> None:
        """`state` is the one after the event that has led to the command."""
        if isinstance(command, PublishGlobals):
            self._publisher.publish_globals(command.sha256, command.blob)
        elif isinstance(command, AnnounceRound):
            self._floods.round_opened()
            self._publisher.announce_round(command.round)
            log_round(command.round, len(state.expected))
        elif isinstance(command, SendAck):
            self._publisher.send_ack(command.ack)
        elif isinstance(command, CountRefusal):
            self._refusals.refuse(command.device, state.devices, command.kind, command.text)
        elif isinstance(command, StoreRound):
            log_stragglers(command.closed)
            self._expert_folder.round_closed(command.closed, state.expert)
        elif isinstance(command, Log):
            logger.log(logging.WARNING if command.warning else logging.INFO, command.text)
        elif isinstance(command, Stop) and not command.error:
            log_participation(self._plan.config, state.devices, *self._store.rounds.participation())

    def publish_state(self, state: State) -> None:
        """Publishes status and round at every connection, because the broker may have lost its retained messages."""
        self._publisher.forget_globals()
        task = self._plan.bundle.task
        self._publisher.publish_globals(task.sha256, task.blob)
        self._publisher.publish_status(online=True)
        if state.announced is not None:
            for command in announcement(self._plan, state, state.announced):
                self.execute(command, state)
