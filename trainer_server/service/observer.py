"""What the server shows of itself: to the console, and to commands that read the run's folder."""

from __future__ import annotations

import contextlib
import logging
import math
import time

from fedfmsl.transport.identity import describe_expiry
from fedfmsl.transport.link import Link
from fedfmsl.transport.settings import SERVER_NAME
from trainer_server.coordinator import waiting
from trainer_server.coordinator.sessions import approved
from trainer_server.coordinator.state import Plan, State
from trainer_server.service.rest import Rest
from trainer_server.storage.observations import Acted, Observations, ServerView
from trainer_server.storage.run_store import RunStore

logger = logging.getLogger(__name__)


class Observer:
    def __init__(self, plan: Plan, store: RunStore, link: Link, observations: Observations, rest: Rest) -> None:
        self._plan = plan
        self._store = store
        self._link = link
        self._observations = observations
        self._rest = rest
        self._outage = (-1.0, "")  # as stored

    def observe(self, state: State, deadline: float, acted: Acted | None) -> None:
        """Shows where the run stands. `deadline`: seconds until the next one; infinite if there is none. `acted`: the
        operator's last action."""
        if not self._observations.is_due:  # why a run waits takes a look at each device
            return
        seen = time.time()
        self._observations.save(
            ServerView(
                seen=seen,
                deadline=seen + deadline if math.isfinite(deadline) else None,
                paused=state.paused_at is not None,
                rests=self._rest.text,
                waits=waiting.reason(self._plan, state) if state.waiting or self._is_short(state) else "",
                round_timeout=state.limits.round_timeout,
                excluded=tuple(sorted(state.excluded)),
                acted=acted,
                adds=approved(self._plan, state),
            ),
            state.devices,
        )

    def save_certificates(self) -> None:
        """Stores when they expire, and logs it if that is soon."""
        found = {SERVER_NAME: self._link.own_until, "broker": self._link.broker_until}
        until = {name: moment for name, moment in found.items() if moment}
        for name, moment in until.items():
            text, is_soon = describe_expiry(moment, time.time(), name)
            if is_soon:
                logger.warning("the certificate of the %s is valid %s", name, text)
        with contextlib.suppress(OSError):  # a full disk
            self._store.files.save_certificates(until)

    def save_outage(self) -> None:
        """Stores since when there is no connection to the broker, if that has changed."""
        outage = (self._link.outage.since, self._link.outage.reason)
        if outage != self._outage:
            with contextlib.suppress(OSError):  # a full disk is logged when an event cannot be stored
                self._store.files.save_outage(*outage)
                self._outage = outage

    def _is_short(self, state: State) -> bool:
        """Whether a later session cannot begin, because too few devices can answer."""
        begins = state.announced is None and state.round > 0 and not self._rest.text
        return begins and waiting.is_short(self._plan, state)
