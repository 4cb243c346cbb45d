"""All messages that server and devices exchange, as pydantic models. Times are unix seconds, accuracies shares of one.

A message may come from an unauthorized client: each field has bounds, and each message a maximum length.
"""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from fedfmsl.algorithms.draw import Draw
from fedfmsl.algorithms.privacy import Privacy
from fedfmsl.algorithms.sal import Sal
from fedfmsl.errors import MessageError, one_line, shown
from fedfmsl.protocol.chunks import CHUNK_BYTES, check_chunk_size
from fedfmsl.protocol.class_names import MAX_CLASSES, proposable, valid_name
from fedfmsl.protocol.topics import MAX_NUMBER, NAME

MAX_NAMED = 2500  # devices in an announcement; with the longest names it has 170 KB
Name = Annotated[str, Field(pattern=f"^{NAME}$")]  # run or device
Names = Annotated[tuple[Name, ...], Field(max_length=MAX_NAMED, fail_fast=True)]
Session = Annotated[str, Field(pattern=r"^[0-9A-Za-z-]{1,64}$")]
Sha256 = Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]  # "" if there is none; used as a file name
Url = Annotated[str, Field(pattern=r"^(https?://[!-~]+)?$", max_length=2048)]
Key = Annotated[str, Field(pattern=r"^[0-9A-Za-z._-]{1,64}$")]
Text = Annotated[str, AfterValidator(one_line)]  # for people; a longer text is cut
ClassName = Annotated[str, AfterValidator(valid_name)]
ProposedName = Annotated[str, AfterValidator(proposable)]
MAX_ADDED = 64  # classes at once
AddedNames = Annotated[tuple[ProposedName, ...], Field(max_length=MAX_ADDED, fail_fast=True)]
FileName = Annotated[str, AfterValidator(shown), Field(max_length=16_384)]  # the longest path, each byte as \xff
Number = Annotated[int, Field(ge=0, le=MAX_NUMBER)]
Positive = Annotated[int, Field(ge=1, le=MAX_NUMBER)]
Level = Annotated[int, Field(ge=0, le=1024)]
ChunkBytes = Annotated[int, AfterValidator(check_chunk_size)]
Count = Annotated[int, Field(ge=0, le=2**53)]  # also exact as a float
MAX_AMOUNT = 2**53
MAX_PROPOSED = 16  # classes that one device proposes
Amount = Annotated[float, Field(ge=0, le=MAX_AMOUNT)]


class Message(BaseModel):
    """`max_bytes`: the maximum length of its JSON as an MQTT payload."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    max_bytes: ClassVar[int] = 64 * 1024


class Stage(str, Enum):
    """What devices do in a round. `global` and `personal` are stages 1 and 2 of the paper; the others are ours."""

    STATISTICS = "statistics"  # class sums of the features: the first head, unless it is zeros
    GLOBAL = "global"  # stage 1: train the global expert
    HEAD = "head"  # class sums and second moments of the global expert's logits or features: its final head
    PERSONAL = "personal"  # stage 2: train the local expert and the gate adapter
    BASELINE = "baseline"  # train alone, for comparison; nothing is aggregated
    EVALUATE = "evaluate"  # measure on the test split, write the personalized model
    FINISHED = "finished"  # nothing more to do
    # The shuffles of training depend on a stage's position, so all others follow.
    # Secure sums: around the masked vectors of `holders` and of `statistics` or `head`.
    KEYS = "keys"  # public keys
    SHARES = "shares"  # encrypted shares of the seeds of the masks
    HOLDERS = "holders"  # how many samples and devices each class has
    UNMASK = "unmask"  # the shares that remove the masks from a sum
    CANARY = "canary"  # some devices measure the global expert before all others receive it


class Sums(str, Enum):
    """What devices sum over their samples for the server, in the rounds of statistics and head."""

    LOGITS = "logits"  # of the global expert, by class
    FEATURES = "features"  # by class
    NONE = "none"  # only counts and norms


EXCHANGE = (Stage.KEYS, Stage.SHARES, Stage.UNMASK)  # the rounds of secure sums without samples
NOISED = (Stage.STATISTICS, Stage.GLOBAL, Stage.PERSONAL)  # with privacy, devices add noise to these

EngineName = Literal["step-graph", "ort-training"]


class Training(Message):
    """Local training of an expert with AdamW. Weight decay does not apply to the head."""

    epochs: Positive
    batch_size: Positive = 16
    learning_rate: float = Field(gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    seed: Count = 0


class Encoding(str, Enum):
    """Encoding of the values of an update (see `fedfmsl.protocol.encoding`)."""

    FP32 = "fp32"
    FP16 = "fp16"
    INT8 = "int8"


class ServerStatus(Message):
    """Retained, last will. Each execution of a run name has its own `session`; a restarted server keeps it. It
    distinguishes messages and files of an earlier execution. `first_session`: the same in all sessions of a run.
    `instance`: random at each start of a server. `ended`: no device waits for this run. `chunk_bytes`: the size of
    chunks that the broker takes. `task`: the SHA-256 of the run's task, whose chunks are among those of globals.
    """

    online: bool
    run: Name
    session: Session
    first_session: Session | None = None
    instance: str = Field(default="", max_length=32)
    ended: bool = False
    bundle: Sha256 = ""
    task: Sha256 = ""
    bundle_url: Url = ""
    model: Text = ""
    chunk_bytes: ChunkBytes = CHUNK_BYTES


class Round(Message):
    """The announcement of a round, retained. That of FINISHED describes stage 2, for devices that took no part in the
    run: `training`, `sal`, and as `repetitions` its rounds.

    `expert` (the global expert), `start` (the expert that stage 1 starts from) and `gate` are the SHA-256 of blobs of
    globals; "" if there is none yet.

    Which devices are selected: those named in `chosen`. If it is empty, all that are in `draw` (None: all), except
    those named in `unasked`. So the announcement to many devices stays short.

    Rounds of statistics and head: `sums` is what devices sum (in stage 1: what they will sum in the round of the head),
    `min_class_count` the number of samples from which a
    device's class is in them. `secure`: the round belongs to secure aggregation. Of its class sums, `classes` are those
    that are asked for (empty: all). `roster` and
    `shares` are the SHA-256 of the blobs of public keys and of encrypted shares.
    """

    max_bytes = 192 * 1024  # mostly `chosen`

    run: Name
    session: Session
    round: Number
    stage: Stage
    index: Number  # within its stage, from 0
    of: Number  # rounds of this stage
    repetitions: Positive = 1  # how many times a device trains its local epochs in the round
    level: Level
    chosen: Names = ()
    unasked: Names = ()
    draw: Draw | None = None
    expert: Sha256 = ""
    start: Sha256 = ""
    gate: Sha256 = ""
    sums: Sums = Sums.NONE
    min_class_count: Number = 0
    secure: bool = False
    classes: tuple[Annotated[int, Field(ge=0, lt=MAX_CLASSES)], ...] = Field(
        default=(), max_length=MAX_CLASSES, fail_fast=True
    )
    roster: Sha256 = ""
    shares: Sha256 = ""
    training: Training
    sal: Sal
    encoding: Encoding = Encoding.FP32
    privacy: Privacy | None = None

    def asks(self, device: str) -> bool:
        """Whether a device is selected."""
        if self.chosen:
            return device in self.chosen
        return device not in self.unasked and (self.draw is None or self.draw.has(self.round, device))

    @property
    def selects(self) -> bool:
        """Whether there may be devices that are not selected."""
        return bool(self.chosen or self.unasked or self.draw)

    @property
    def blobs(self) -> frozenset[str]:
        """SHA-256 of the blobs of globals that the round needs."""
        return frozenset({self.expert, self.start, self.gate, self.roster, self.shares} - {""})

    @property
    def ordinal(self) -> tuple[int, int]:
        """The round's number within its stage, from 1, and how many there are. Rounds that remove masks are numbered as
        those of keys and shares are: `of` counts VECTORS for each secure aggregation, and most have one."""
        if self.stage is not Stage.UNMASK:
            return self.index + 1, self.of
        from fedfmsl.algorithms.secure_aggregation import VECTORS  # takes 8 MB

        return self.index // VECTORS + 1, self.of // VECTORS

    @model_validator(mode="after")
    def _secure_sums_of_their_stages_only(self) -> Round:
        if self.stage in (*EXCHANGE, Stage.HOLDERS) and not self.secure:
            raise ValueError(f"stage {self.stage.value} belongs to secure aggregation only")
        if self.secure and self.stage in (Stage.CANARY, Stage.BASELINE, Stage.EVALUATE, Stage.FINISHED):
            raise ValueError(f"stage {self.stage.value} has no secure aggregation")
        return self

    @model_validator(mode="after")
    def _no_sums_without_noise(self) -> Round:
        if self.stage in (Stage.HEAD, Stage.HOLDERS) and self.privacy is not None:
            raise ValueError(f"a run with privacy has no stage {self.stage.value}, because its sums have no noise")
        return self


class Globals(Message):
    """Header of a blob of globals. It has no round number, so that unchanged globals keep their SHA-256."""

    run: Name
    kind: Key


class DeviceStatus(Message):
    """Retained, last will; also published whenever the server comes online. `instance` is random at each start and
    detects a duplicate device name. `paused`: why the device may not train now; new rounds do not wait for a paused
    device. `error`: why it cannot take part; no round waits for it. `proposed`: classes that the task lacks and this
    device has labelled samples of, and how many. `new_samples`: training samples that no round of stage 1 or 2 has used
    yet."""

    device: Name
    online: bool
    instance: str = Field(default="", max_length=32)
    bundle: Sha256 = ""
    level_cap: Level = 0
    train: Count = 0
    held_out: Count = 0
    test: Count = 0
    new_samples: Count = 0
    proposed: dict[ProposedName, Count] = Field(default={}, max_length=MAX_PROPOSED)
    paused: Text = ""
    error: Text = ""


class Progress(Message):
    device: Name
    activity: Text
    done: Count
    total: Count


class Activity(str, Enum):
    """What a device is doing."""

    STARTING = "starting"  # downloads the bundle, measures
    WAITING = "waiting"  # for the server or the next round
    WORKING = "working"
    PAUSED = "paused"  # its governor does not allow training
    STOPPED = "stopped"


HEALTH_SECONDS = 60.0  # between two messages while nothing changes
MAX_HEARTBEAT_AGE = 3 * HEALTH_SECONDS + 30  # seconds; a process without a heartbeat for longer counts as dead


class Health(Message):
    """A device's health for its operator, and its heartbeat, retained.

    `time` and `started` are unix seconds, sizes are bytes, temperatures °C. `others`: share of the processors that
    other processes use. `slowdown`: duration of a training step, relative to the measured one. `paused`: the reason.
    `provider`: the execution provider in use, and why not another. `disconnected`: why there is no connection to the
    broker, `disconnected_since`: since when (unix seconds), `rejected`: because the broker refuses the certificate.
    `certificate_until` and `broker_certificate_until`: when they expire (unix seconds); 0 if there is none.
    `not_renewed`: why the last try to renew the certificate failed. `new_samples` and `proposed`: as in DeviceStatus.
    `refused`: what the broker seems to refuse. `epsilon`: the privacy budget of all its runs at δ = 1e-5; None if it
    has sent no update with noise, or also some without.
    """

    device: Name
    time: Amount
    started: Amount
    version: Text = ""
    board: Text = ""
    activity: Activity
    paused: Text = ""
    round: Number = 0
    stage: Text = ""
    level: Level = 0
    level_cap: Level = 0
    provider: Text = ""
    slowdown: Amount = 1.0
    temperature: float | None = Field(default=None, ge=-273, le=1000)
    others: float | None = Field(default=None, ge=0, le=1)
    on_battery: bool | None = None
    metered: bool | None = None
    throttled: bool | None = None
    memory: Count = 0
    disk_free: Count = 0
    cache: Count = 0
    train: Count = 0
    held_out: Count = 0
    test: Count = 0
    new_samples: Count = 0
    proposed: dict[ProposedName, Count] = Field(default={}, max_length=MAX_PROPOSED)
    skipped: Count = 0
    unacknowledged: Count = 0
    rounds_done: Count = 0
    refused: Text = ""
    epsilon: Amount | None = None
    disconnected: Text = ""
    disconnected_since: Amount = 0
    rejected: bool = False
    certificate_until: Amount = 0
    broker_certificate_until: Amount = 0
    not_renewed: Text = ""


class Prediction(Message):
    """The personalized model's prediction for one file, retained. `file`: its name; on the device itself, its path.
    `label`: a class or `unknown`. `round`: the round of the model. `probabilities` are calibrated; a message that would
    be too long has only the highest ones."""

    max_bytes = 192 * 1024  # mostly `probabilities`

    device: Name
    file: FileName
    time: Amount
    label: ClassName
    confidence: float = Field(ge=0, le=1)
    probabilities: dict[ClassName, float] = Field(max_length=MAX_CLASSES)
    round: Number


class Update(Message):
    """Header of a client update: trained values minus the globals of the round; in the rounds of statistics and head,
    sums. `samples` is its weight, `level` the level at which it was trained."""

    run: Name
    session: Session
    round: Number
    device: Name
    stage: Stage
    level: Level
    samples: Count
    metrics: dict[Key, float] = Field(default={}, max_length=64)
    counts: dict[Key, Annotated[list[Count], Field(max_length=MAX_CLASSES, fail_fast=True)]] = Field(
        default={}, max_length=16
    )
    engine: str = Field(default="", max_length=32)
    seconds: Amount = 0.0
    peak_rss_mb: Amount = 0.0
    bytes_down: Count = 0


class Verdict(str, Enum):
    ACCEPTED = "accepted"
    DUPLICATE = "duplicate"
    LATE = "late"
    REJECTED = "rejected"
    INCOMPLETE = "incomplete"


class Ack(Message):
    """The server's verdict on an update. INCOMPLETE is none yet: the chunks `missing` have not arrived."""

    run: Name
    session: Session
    round: Number
    device: Name
    verdict: Verdict
    reason: Text = ""
    missing: tuple[Number, ...] = Field(default=(), max_length=64, fail_fast=True)


M = TypeVar("M", bound=Message)


def parse(message_type: type[M], payload: bytes) -> M:
    """Raises MessageError if the payload is longer than `max_bytes` of the type or not a valid message."""
    if len(payload) > message_type.max_bytes:
        raise MessageError(f"{message_type.__name__} of {len(payload)} bytes: more than {message_type.max_bytes}")
    try:
        return message_type.model_validate_json(payload)
    except ValidationError as error:
        raise MessageError(f"not a valid {message_type.__name__}: {first_error(error)}") from None


def compact(message: M) -> M:
    """The message in half of the memory, for a server that keeps those of ten thousand devices.

    All messages of a type share the keys of their fields, pydantic's set of the fields that were given, which is used
    nowhere, and each value that is equal to that of the latest message. A message is never changed.
    """
    kind = type(message)
    if kind not in _LATEST:
        _LATEST[kind] = _with_shared_keys(tuple(vars(message))), set(kind.model_fields)
    latest, given = _LATEST[kind]
    fields = latest.copy()
    for name, value in vars(message).items():
        if value != latest[name]:
            fields[name] = value
    _LATEST[kind] = fields, given
    object.__setattr__(message, "__dict__", fields)
    object.__setattr__(message, "__pydantic_fields_set__", given)
    return message


# By type: the fields of the latest message, and the names of all fields.
_LATEST: dict[type[Message], tuple[dict[str, Any], set[str]]] = {}


def _with_shared_keys(names: tuple[str, ...]) -> dict[str, Any]:
    """A dict of None that shares its keys with its copies, as those of the attributes of objects do in CPython."""
    kind = type("Fields", (), {})
    for _ in range(2 * len(names)):  # the first ones reserve space for further keys
        one = kind()
        for name in names:
            setattr(one, name, None)
    fields: dict[str, Any] = vars(one)
    return fields


def first_error(error: ValidationError) -> str:
    """The first problem as one line. Of more than 100 only the number: listing them takes megabytes."""
    if error.error_count() > 100:
        return f"{error.error_count()} errors"
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or "payload"
    return one_line(f"{where}: {first['msg']}")


def encode(message: Message) -> bytes:
    return message.model_dump_json().encode()
