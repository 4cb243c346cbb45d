"""The daemon's I/O loop: MQTT, clock and commands of the state machine. The computation runs in the worker thread.

The loop takes one event at a time from the link's queue, where the worker thread puts its events as well, and never
waits for the computation. So a device stays online and sends heartbeats while it trains or pauses.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque

from edge_runtime.daemon.announce import INSTANCE, Announcer
from edge_runtime.daemon.disk_retry import DiskRetry
from edge_runtime.daemon.globals import GlobalsReceiver
from edge_runtime.daemon.health import HealthReporter
from edge_runtime.daemon.jobs import Jobs
from edge_runtime.daemon.round_runner import RoundRunner
from edge_runtime.daemon.state import (
    Acknowledge,
    AckOverdue,
    AckSeen,
    Command,
    Event,
    Fetch,
    GlobalArrived,
    Idle,
    Log,
    OwnStatusSeen,
    PublishStatus,
    Reconnected,
    RoundSeen,
    Send,
    ServerSeen,
    State,
    Stop,
    Work,
    advance,
    is_outdated,
    joins_late,
    required_globals,
)
from edge_runtime.daemon.status import describe_model
from edge_runtime.daemon.timing import DEFAULT_TIMING, Timing
from edge_runtime.daemon.update_sender import UpdateSender
from edge_runtime.daemon.worker import JobEnded, Progress, Worker
from edge_runtime.resources.governor import Governor
from fedfmsl.common.logs import fields
from fedfmsl.errors import FedFMSLError, MessageError, RunError
from fedfmsl.protocol.duplicate_name import DuplicateNameGuard
from fedfmsl.protocol.messages import Ack, Activity, DeviceStatus, Round, ServerStatus, Stage, parse
from fedfmsl.protocol.tensors import blob_bytes
from fedfmsl.protocol.topics import Topics
from fedfmsl.transport.link import Connected, Disconnected, Link, LinkEvent, Posted, Received, SubscriptionRefused

logger = logging.getLogger(__name__)

KEYS_BYTES = 16 * 1024 * 1024  # of the keys or the shares of secure sums, for more than 2500 devices
ECHO_SECONDS = 10.0  # for the broker to return this device's own status
NO_ECHO = "the broker does not return this device's own status"
STOPS = "this device stops; with --stay it waits for the next run of this name, as an installed service does"
UNACKNOWLEDGED = "the server has not acknowledged an update"
IF_REPEATED = (
    "If this repeats, check the broker's access rules for this device's name, its limits (size and number of messages) "
    "and the server's log; python -m edge_runtime check tries them"
)


class DaemonLoop:
    def __init__(
        self,
        topics: Topics,
        link: Link,
        announcer: Announcer,
        health: HealthReporter,
        governor: Governor,
        runner: RoundRunner,
        worker: Worker,
        stay: bool = False,
        timing: Timing = DEFAULT_TIMING,
    ) -> None:
        """With `stay` the device waits for the next run of that name when the run has finished."""
        device, store = runner.device, runner.device.store
        self._topics = topics
        self._link = link
        self._announcer = announcer
        self._health = health
        self._governor = governor
        self._runner = runner
        self._worker = worker
        self._stay = stay
        self._timing = timing
        self._name = device.device_name
        self._store = store
        largest = max(blob_bytes(max(device.bundle.expert.total, device.bundle.gate.total)), KEYS_BYTES)
        self._globals = GlobalsReceiver(link, self._topics, store.globals, largest, device.device_name)
        self._disk = DiskRetry(store, device.cache, timing.disk_retry)
        self._updates = UpdateSender(announcer, self._topics, device.device_name, store.outbox, timing.ack)
        self._jobs = Jobs(
            runner, worker, self._globals, self._disk, health, timing, self._handle, self._announce, self._required
        )
        self._connected = True
        self._paused = ""  # the reason, as published
        self._over_budget = ""  # why the announced round would pass the privacy budget
        self._refused = ""  # why the broker does not let this device take part
        self._unheard = ""  # why this device's own status seems to be dropped
        self._unanswered = ""  # why its updates seem to be dropped
        self._echo_due = math.inf  # when this device's own status must have come back
        self._stop: Stop | None = None
        self._finished_session = ""  # the last session whose end has been handled, or logged
        self._next_tick = self._next_sensors = self._next_subscription = 0.0
        store.remove_temporary_files()
        unacknowledged = store.outbox.unacknowledged(store.outbox.session)
        self._state = State(
            device=device.device_name,
            guard=DuplicateNameGuard(INSTANCE),
            bundle=device.bundle.sha256,
            task=device.bundle.task.sha256,
            session=store.outbox.session,
            run=store.outbox.run,
            last_started=max({store.outbox.acknowledged, *unacknowledged}),
            unacknowledged=unacknowledged,
        )

    def serve(self) -> bool:
        """Takes part in the run until it has finished. True: the server has announced another task, for which the
        device must be prepared anew, with the same link. Raises FedFMSLError if this device cannot take part, and every
        other error of the computation."""
        self._link.subscribe(self._topics.ack(self._name))
        self._link.subscribe(self._topics.status(self._name))
        self._subscribe()
        self._echo_due = time.monotonic() + ECHO_SECONDS
        self._announcer.introduce()
        self._check_sensors()  # so that no round waits for a device that is too hot when another task comes
        self._announce()
        stop = Stop()
        try:
            stop = self._loop()
        except FedFMSLError as error:
            stop = Stop(str(error))
            raise
        finally:
            self._worker.control.stop()
            if not (stop.quietly or stop.anew):
                self._announcer.status(self._runner.device, online=False, error=stop.error)
                self._heartbeat(Activity.STOPPED)
            if stop.anew:
                self._globals.keep_only(set())  # unsubscribes
            else:
                self._link.close(self._announcer.last)
            self._worker.close()
        if stop.error:
            raise RunError(stop.error)
        return stop.anew

    def _loop(self) -> Stop:
        timeout = 0.0
        while self._stop is None:
            event = self._link.next_event(timeout)
            if event is not None:
                self._receive(event)
            if self._stop is None and time.monotonic() >= self._next_tick:
                self._next_tick = time.monotonic() + self._timing.tick
                self._tick()
            if self._stop is None and event is None and self._may_start_round():
                self._handle(Idle())
            timeout = 0.0 if event is not None else self._timing.tick
        return self._stop

    # Events

    def _receive(self, event: LinkEvent) -> None:
        if isinstance(event, Posted):
            if isinstance(event.value, Progress):
                self._announcer.progress(event.value.activity, event.value.done, event.value.total)
            elif isinstance(event.value, JobEnded):
                self._worker.end(event.value)
        elif isinstance(event, Disconnected):
            self._connected = False
        elif isinstance(event, Connected):
            self._connected, self._refused = True, ""
            self._updates.reset_backoff()
            self._announcer.introduce()
            self._announce()
            self._handle(Reconnected())
        elif isinstance(event, SubscriptionRefused):
            logger.warning(event.error)
            self._refused = event.error
            self._announce()
        elif isinstance(event, Received) and event.payload:
            try:
                self._receive_message(event)
            except MessageError as error:
                logger.warning(f"dropped a message on {event.topic}: {error}")

    def _receive_message(self, message: Received) -> None:
        topics = self._topics
        if message.topic == topics.server_status:
            status = parse(ServerStatus, message.payload)
            self._updates.reset_backoff()
            self._updates.chunk_bytes = self._globals.chunk_bytes = status.chunk_bytes
            if status.online:
                self._announce()  # the server counts only devices that answer
            self._handle(ServerSeen(status))
            self._log_end()
        elif message.topic == topics.round:
            round_ = parse(Round, message.payload)
            self._check_budget(round_)
            self._handle(RoundSeen(round_))
            self._log_end()
        elif message.topic == topics.ack(self._name):
            self._handle(AckSeen(parse(Ack, message.payload)))
        elif message.topic == topics.status(self._name):
            self._handle(OwnStatusSeen(parse(DeviceStatus, message.payload)))
        else:
            self._globals.receive(message)
            self._store_globals()

    def _handle(self, event: Event) -> None:
        """Advances the state machine and carries out its commands, until one of them is to stop."""
        events, commands = deque([event]), deque[Command]()
        while (events or commands) and self._stop is None:
            if commands:
                events += self._carry_out(commands.popleft())
            else:
                self._state, new = advance(self._state, events.popleft())
                commands += new
        self._stop_outdated_work()

    def _carry_out(self, command: Command) -> list[Event]:
        """Returns the events that the command causes at once."""
        if isinstance(command, Fetch):
            self._globals.keep_only(required_globals(self._state.announced))
            if self._globals.fetch(command.sha256):
                return [GlobalArrived(command.sha256)]
        elif isinstance(command, Work):
            if self._store.outbox.session != command.round.session:
                self._updates.forget()
            self._jobs.start_round(command.round)
        elif isinstance(command, Send):
            if self._connected:
                self._updates.send(command.round, command.chunks)
        elif isinstance(command, Acknowledge):
            self._updates.acknowledge(command.ack)
        elif isinstance(command, PublishStatus):
            self._announce()
        elif isinstance(command, Log):
            logger.info(command.text)
        elif isinstance(command, Stop):
            self._finish(command)
        return []

    # Clock

    def _tick(self) -> None:
        now = time.monotonic()
        if not self._state.online_session and now >= self._next_subscription:
            self._subscribe()  # amqtt can lose a message during a subscription
        if self._connected and self._updates.overdue():
            if self._state.online_session:
                self._unanswered = UNACKNOWLEDGED
                logger.warning(f"{UNACKNOWLEDGED}; sending it again. {IF_REPEATED}")
            self._handle(AckOverdue())
        if self._connected and now >= self._echo_due and not self._state.guard.confirmed:
            self._echo_due = math.inf
            self._unheard = NO_ECHO
            logger.warning(f"{NO_ECHO}. {IF_REPEATED}")
        self._globals.fetch_missing()
        if now >= self._next_sensors:
            self._check_sensors()
        if self._worker.idle:
            self._runner.device.cache.keep_free()
            self._jobs.scan_if_due()
        self._store_globals()
        working = Activity.WAITING if self._state.running is None else Activity.WORKING
        self._heartbeat(Activity.PAUSED if self._not_working else working)

    def _check_sensors(self) -> None:
        self._next_sensors = time.monotonic() + self._timing.sensors
        self._pause(self._governor.check())

    def _pause(self, reason: str) -> None:
        """Pauses the computation if there is a reason. The server does not wait for a paused device."""
        self._worker.control.pause(bool(reason))
        changed = bool(reason) != bool(self._paused)
        self._paused = reason
        if changed:
            logger.info(f"paused: {reason}" if reason else "resumed", **fields(paused=reason))
            self._announce()
        self._stop_outdated_work()

    def _may_start_round(self) -> bool:
        announced = self._state.announced
        if announced is not None and self._state.running is None:  # the round before may have cost something
            self._check_budget(announced)
        return self._jobs.may_start_round and not self._over_budget

    def _check_budget(self, announced: Round) -> None:
        """Tells the server at once if this device takes no part in the round because of its privacy budget. A round
        `unmask` costs nothing, and changes nothing: it follows a round in which the device took part or did not."""
        before = self._over_budget
        if announced.stage is not Stage.UNMASK:
            self._over_budget = self._runner.budget.refusal(announced)
        if self._over_budget == before:
            return
        if self._over_budget:
            logger.warning(f"takes no part in round {announced.round}: {self._over_budget}")
        else:
            logger.info(f"takes part again from round {announced.round} on")
        self._announce()

    def _stop_outdated_work(self) -> None:
        """During a pause, stops a round when a newer one is announced. Without a pause the round is completed: its
        update is late and counts with a lower weight. Stage 2 alone is stopped, because it has no update."""
        running = self._state.running
        alone = running is not None and running.stage is Stage.FINISHED
        if (self._paused or alone) and is_outdated(self._state):
            self._worker.control.stop()

    def _heartbeat(self, activity: Activity) -> None:
        """The watchdog is not reset while a job makes no step, except during a pause."""
        alive = self._worker.is_alive() or bool(self._paused)
        slowdown = self._runner.tracker.cap.slowdown
        self._health.heartbeat(
            activity, self._runner.device, self._state, self._not_working, slowdown, alive, self._denied()
        )

    @property
    def _not_working(self) -> str:
        """Why this device does not compute now, or ""."""
        return self._paused or self._over_budget or self._jobs.no_samples

    def _denied(self) -> str:
        """What the broker seems to refuse: it drops a message that its access rules forbid without a word."""
        if self._state.guard.confirmed:
            self._unheard = ""
        if not self._state.unacknowledged:
            self._unanswered = ""
        seems = self._unheard or self._unanswered
        return self._refused or (f"{seems}: the broker's access rules or limits may forbid it" if seems else "")

    def _subscribe(self) -> None:
        """Subscribes to the messages for all devices."""
        self._next_subscription = time.monotonic() + self._timing.resubscribe
        self._link.subscribe(self._topics.server_status)
        self._link.subscribe(self._topics.round)

    # End of the run

    def _finish(self, stop: Stop) -> None:
        """Stops the daemon, or waits for the next run."""
        if stop.error or stop.anew:
            self._stop = stop
        elif self._finished_session != self._state.session:
            self._finished_session = self._state.session
            self._jobs.write_missing_model(then=self._finished)

    def _log_end(self) -> None:
        """Logs that a run has finished in which this device did not take part, and which it cannot use."""
        state, announced = self._state, self._state.announced
        if announced is None or announced.stage is not Stage.FINISHED or announced.session != state.server_session:
            return
        is_other = announced.session not in (state.session, self._finished_session)
        if is_other and not joins_late(state, announced):
            self._finished_session = announced.session
            logger.info(
                f"run {announced.run!r} has finished without this device; waiting for a new run of this name; the "
                f"model for predictions is {describe_model(self._store)}"
            )

    def _finished(self) -> None:
        finished, path = f"run {self._topics.run!r} has finished", self._store.personalized
        if path.is_file():
            logger.info(f"{finished}; this device's model is {path}")
        else:
            logger.warning(f"{finished}; this device has no model: it completed no round in which one is trained")
        if self._stay:
            logger.info("waiting for the next run of this name")
        else:
            logger.info(STOPS)
            self._stop = Stop()

    # Disk and network

    def _store_globals(self) -> None:
        try:
            while not self._disk.waiting and (sha256 := self._globals.store_next()) is not None:
                self._disk.succeeded()
                self._handle(GlobalArrived(sha256))
        except OSError as error:
            self._jobs.disk_failed(error)

    def _required(self) -> set[str]:
        """SHA-256 of the global blobs that the announced and the running round need."""
        return required_globals(self._state.announced) | required_globals(self._state.running)

    def _announce(self) -> None:
        if self._stop is None:
            self._announcer.status(
                self._runner.device,
                paused=self._paused or self._over_budget,
                error=self._refused or self._jobs.no_samples,
            )
