"""The shell around the daemon: MQTT, disk, and the computation itself, which runs between two looks at the queue.

While the computation pauses, which may be for hours, the looks go on: so the device stays there for the server and for
whoever looks after it, and gives the round up once a newer one is announced.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque

import paho.mqtt.client as paho

from edge_runtime.daemon.announce import INSTANCE, progress_to, status_of
from edge_runtime.daemon.health import HealthReporter
from edge_runtime.daemon.retransmit import Retransmissions
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
    WorkDone,
    WorkFailed,
    advance,
    required_globals,
)
from edge_runtime.daemon.timing import DEFAULT_TIMING, Timing
from edge_runtime.daemon.worker import Worker, write_personalized
from edge_runtime.data.samples import SampleChangedError
from edge_runtime.training.context import TrainingContext
from fedfmsl.common.logs import fields
from fedfmsl.errors import FedFMSLError, InputError, MessageError, RunError
from fedfmsl.protocol.chunks import Assembler, chunks
from fedfmsl.protocol.duplicate_name import DuplicateNameGuard
from fedfmsl.protocol.messages import (
    Ack,
    Activity,
    DeviceStatus,
    Prediction,
    Round,
    ServerStatus,
    Verdict,
    encode,
    parse,
)
from fedfmsl.protocol.tensors import blob_bytes, blob_hash
from fedfmsl.protocol.topics import Topics
from fedfmsl.transport.link import Connected, Disconnected, Link, Received

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
ASK_SECONDS = 30.0  # without a server
FOLDER_SECONDS = 60.0  # from one look at the folder to the next, between rounds
FOLDER_SHARE = 0.01  # of the time, at most, for these looks: a folder of many files is looked at less often


class _GivenUpError(Exception):
    """The round that is being worked on is no longer worth it: it is not the newest, or the device has to leave."""


class Service:
    """The host of the worker's pace (see `edge_runtime.resources.throttle`)."""

    def __init__(
        self,
        worker: Worker,
        run: str,
        link: Link,
        health_reporter: HealthReporter,
        introduction: tuple[str, bytes] | None = None,
        stays: bool = False,
        timing: Timing = DEFAULT_TIMING,
    ) -> None:
        """`introduction`: topic and payload of what introduces this device to Home Assistant. With `stays` it waits,
        once the run has finished, for the next of that name."""
        self._timing = timing
        self._worker = worker
        self._run = run
        self._topics = Topics(run)
        self._link = link
        self._health_reporter = health_reporter
        self._introduction = introduction
        self._stays = stays
        self._tell = progress_to(link, self._topics, worker.device.device_name)
        self._paused = ""  # why, as it was announced
        self._leave: Stop | None = None
        self._finished = ""  # the session of the run that it has stayed after
        self._trouble = ""  # with the folder, as it was said
        self._next_look = 0.0  # at the folder
        self._connected = True
        self._bytes_down = 0
        self._fetching: dict[str, Assembler] = {}
        device = worker.device
        self._retransmissions = Retransmissions(device.device_name, timing.ack)
        self._disk_attempts = 0  # to write what could not be written
        self._last: paho.MQTTMessageInfo | None = None
        store = device.store
        store.remove_temporary_files()
        unacknowledged = store.unacknowledged(store.session)
        self._state = State(
            device=device.device_name,
            guard=DuplicateNameGuard(INSTANCE),
            bundle=device.bundle.sha256,
            session=store.session,
            done=max({store.acknowledged, *unacknowledged}),
            unacknowledged=unacknowledged,
        )
        worker.pace.host = self

    @property
    def _device(self) -> TrainingContext:
        return self._worker.device

    def serve(self) -> None:
        """Until the run has finished. Raises FedFMSLError if this device cannot take part."""
        topics, name = self._topics, self._device.device_name
        self._link.subscribe(topics.ack(name))
        self._link.subscribe(topics.status(name))
        self._subscribe()
        self._introduce()
        self._announce()
        logger.info(f"waiting for the server of run {self._run!r}")
        leave = Stop()
        try:
            leave = self._follow()
            if not leave.error:
                self._finish()
        except FedFMSLError as error:
            leave = Stop(str(error))
            raise
        finally:
            if not leave.quietly:
                self._announce(online=False, error=leave.error)
                self._heartbeat(Activity.STOPPED)
            self._link.close(self._last)
        if leave.error:
            raise RunError(leave.error)

    def predicted(self, prediction: Prediction) -> None:
        """Publishes what this device's model says of a file. To be called in any thread."""
        said = prediction.model_copy(update={"device": self._device.device_name})
        self._link.publish(self._topics.prediction(self._device.device_name), encode(said), retain=True)

    def _subscribe(self) -> None:
        """To what the run's server says to everybody."""
        self._link.subscribe(self._topics.server_status)
        self._link.subscribe(self._topics.round)

    def _follow(self) -> Stop:
        """Events in, commands out, until one of them is to leave."""
        wait, asked = 0.0, time.monotonic()
        while self._leave is None:
            if not self._state.present and time.monotonic() > asked + ASK_SECONDS:
                asked = time.monotonic()
                self._subscribe()  # anew: amqtt can lose what comes while one subscribes
            event = self._event(wait)
            wait = 0.0 if event else LOOK_SECONDS
            if event is None:
                self._look_around()
            self._handle(event or Idle())
        return self._leave

    def _handle(self, event: Event) -> None:
        todo = deque(self._advance(event))
        while todo and self._leave is None:
            command = todo.popleft()
            result = self._carry_out(command)
            if result is not None:
                todo.extend(self._advance(result))

    def _look_around(self) -> None:
        """What is looked at between rounds, now and then."""
        if self._connected and self._retransmissions.overdue():
            self._handle(AckOverdue())
        self._announce_pause(self._worker.pace.look())
        if time.monotonic() > self._next_look:
            self._look_at_folder()
        self._device.cache.keep_free()
        self._heartbeat(Activity.PAUSED if self._paused else Activity.WAITING)

    def _look_at_folder(self) -> bool:
        """Whether there is something to train on. It is said once if there is not."""
        started = time.monotonic()
        try:
            if self._worker.look():
                self._announce()
        except InputError as error:
            if str(error) != self._trouble:
                self._trouble = str(error)
                logger.warning(f"{error}; waiting for it")
            return False
        except OSError as error:
            self._wait_for_disk(error)
            return False
        finally:
            now = time.monotonic()
            self._next_look = now + max(FOLDER_SECONDS, (now - started) / FOLDER_SHARE)
        self._trouble = ""
        return True

    def progress(self, activity: str, done: int, total: int) -> None:
        self._tell(activity, done, total)
        self._heartbeat(Activity.WORKING)

    def pause(self, reason: str) -> None:
        """While training is forbidden: a look at what has come. Raises _GivenUpError if the round is not to be gone on
        with."""
        self._announce_pause(reason)
        if not reason:
            return
        self._heartbeat(Activity.PAUSED)
        working = self._state.announced
        event = self._event(LOOK_SECONDS)
        if event is not None:
            self._handle(event)
        if self._leave is not None or self._state.announced != working:
            raise _GivenUpError

    def _announce_pause(self, reason: str) -> None:
        """Rounds that open do not wait for a device that pauses."""
        changed = bool(reason) != bool(self._paused)
        self._paused = reason
        if changed:
            logger.info(f"pauses: {reason}" if reason else "goes on", **fields(paused=reason))
            self._announce()

    def _heartbeat(self, activity: Activity) -> None:
        self._health_reporter.heartbeat(self._device, activity, self._state, self._paused)

    def _take_leave(self, leave: Stop) -> None:
        """A run that has finished is no reason to, for a device that stays."""
        if leave.error or not self._stays:
            self._leave = leave
        elif self._finished != self._state.session:
            self._finish()
            logger.info("this device stays, and waits for the next run of this name")

    def _finish(self) -> None:
        self._finished = self._state.session
        store = self._device.store
        try:
            if store.is_model_newer:  # the evaluation was missed
                write_personalized(self._device)
        except (OSError, RunError) as error:
            logger.warning(
                f"{store.personalized} could not be written ({error}); edge_runtime personalize tries it again"
            )
        logger.info(f"run {self._run!r} has finished; this device's model is {store.personalized}")

    def _introduce(self) -> None:
        """To Home Assistant, whose broker may know nothing of us."""
        if self._introduction is not None:
            self._publish(*self._introduction, retain=True)

    def _advance(self, event: Event) -> list[Command]:
        self._state, commands = advance(self._state, event)
        return commands

    def _event(self, timeout: float) -> Event | None:
        received = self._link.next_event(timeout)
        if isinstance(received, Disconnected):
            if self._connected:
                logger.warning(f"no connection to the broker ({received.reason}); trying again and again")
            self._connected = False
        if isinstance(received, Connected):
            if not self._connected:
                logger.info("connected to the broker again")
            self._connected = True
            self._retransmissions.start_over()
            self._introduce()
            self._announce()
            return Reconnected()
        if not isinstance(received, Received) or not received.payload:
            return None
        try:
            if received.topic == self._topics.server_status:
                self._retransmissions.start_over()
                return ServerSeen(parse(ServerStatus, received.payload))
            if received.topic == self._topics.round:
                return RoundSeen(parse(Round, received.payload))
            if received.topic == self._topics.ack(self._device.device_name):
                return AckSeen(parse(Ack, received.payload))
            if received.topic == self._topics.status(self._device.device_name):
                return OwnStatusSeen(parse(DeviceStatus, received.payload))
            return self._global_chunk(received)
        except MessageError as error:
            logger.warning(f"dropped a message on {received.topic}: {error}")
            return None

    def _global_chunk(self, received: Received) -> Event | None:
        sha256 = self._topics.globals_of(received.topic)
        if sha256 not in self._fetching:  # amqtt sends a new client what is retained for any other
            return None
        self._bytes_down += len(received.payload)
        blob = self._fetching[sha256].add(received.payload)
        if blob is None:
            return None
        if blob_hash(blob) != sha256:
            raise MessageError(f"the blob under {sha256[:12]}… has another SHA-256")
        self._forget(sha256)
        while True:
            try:
                self._device.store.keep_global(blob)
            except OSError as error:
                self._wait_for_disk(error)
            else:
                self._disk_attempts = 0
                return GlobalArrived(sha256)

    def _forget(self, sha256: str) -> None:
        self._link.unsubscribe(self._topics.globals_chunk(sha256, "+"))
        del self._fetching[sha256]

    def _wait_for_disk(self, error: OSError) -> None:
        """What could not be written is tried anew after this; nothing of it has been sent. Says so when it begins, and
        frees what can be made or fetched again."""
        if not self._disk_attempts:
            where = f"--state {self._device.store.root}"
            logger.warning(
                f"{where} does not take what has to be kept ({error}); it is tried again until there is room"
            )
        with contextlib.suppress(OSError):  # a disk that has become read-only, which somebody may mend
            self._device.cache.evict_all()
            self._device.store.drop_globals(keep=required_globals(self._state.announced))
        if self._disk_attempts:
            time.sleep(self._timing.disk_retry.delay(self._disk_attempts - 1))
        self._disk_attempts += 1

    def _carry_out(self, command: Command) -> Event | None:
        if isinstance(command, Fetch):
            if self._device.store.global_blob(command.sha256) is not None:
                return GlobalArrived(command.sha256)
            for sha256 in self._fetching.keys() - required_globals(self._state.announced):
                self._forget(sha256)
            bundle = self._device.bundle
            cap_bytes = blob_bytes(max(bundle.expert.total, bundle.gate.total))
            self._fetching.setdefault(command.sha256, Assembler(cap_bytes))
            self._link.subscribe(self._topics.globals_chunk(command.sha256, "+"))
        elif isinstance(command, Work):
            return self._work(command.round)
        elif isinstance(command, Send):
            self._send(command.round)
        elif isinstance(command, Acknowledge):
            self._acknowledge(command.ack)
        elif isinstance(command, PublishStatus):
            self._announce()
        elif isinstance(command, Log):
            logger.info(command.text)
        elif isinstance(command, Stop):
            self._take_leave(command)
        return None

    def _work(self, task: Round) -> WorkDone | WorkFailed:
        if not self._look_at_folder():
            time.sleep(LOOK_SECONDS)
            return WorkFailed(task.round)
        try:
            if self._device.store.enter(task.session):
                self._retransmissions = Retransmissions(self._device.device_name, self._timing.ack)
            self._worker.pace.keep()
            seconds = self._worker.work(task, self._bytes_down)
        except _GivenUpError:
            return WorkFailed(task.round)
        except SampleChangedError as error:
            logger.info(f"round {task.round} is begun anew: {error}", **fields(round=task.round))
            return WorkFailed(task.round)
        except OSError as error:
            self._wait_for_disk(error)
            return WorkFailed(task.round)
        self._disk_attempts, self._bytes_down = 0, 0
        self._health_reporter.rounds_done += 1
        logger.info(
            f"round {task.round}: {task.stage.value} done in {seconds:.1f} s",
            **fields(round=task.round, stage=task.stage.value, level=task.level, seconds=round(seconds, 3)),
        )
        return WorkDone(task.round)

    def _send(self, round_: int) -> None:
        """Unless it is being sent anyway: what paho has not delivered yet survives a reconnection in its queue."""
        if not self._connected or self._retransmissions.on_its_way(round_):
            return
        blob = self._device.store.update(round_)
        if blob is not None:
            topics, name = self._topics, self._device.device_name
            sent = [self._publish(topics.update_chunk(name, round_, i), chunk) for i, chunk in enumerate(chunks(blob))]
            self._retransmissions.sent(round_, sent[-1])

    def _acknowledge(self, ack: Ack) -> None:
        self._retransmissions.acknowledged(ack.round)
        try:
            self._device.store.acknowledge(ack.round)
        except OSError as error:  # no harm: after a restart it is sent once more, and answered once more
            logger.warning(f"the update of round {ack.round} is kept, though acknowledged ({error})")
        if ack.verdict is not Verdict.ACCEPTED:
            logger.info(f"update of round {ack.round}: {ack.verdict.value} {ack.reason}")

    def _announce(self, online: bool = True, error: str = "") -> None:
        status = status_of(self._device, online, self._paused, error)
        self._publish(self._topics.status(status.device), encode(status), retain=True)

    def _publish(self, topic: str, payload: bytes, retain: bool = False) -> paho.MQTTMessageInfo:
        self._last = self._link.publish(topic, payload, retain)
        return self._last
