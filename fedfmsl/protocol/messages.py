"""Every message of the wire, as a pydantic model. Times are unix seconds; accuracies are shares of one.

Whoever writes a message may be anybody: each field has a bound, and each message a greatest length.
"""

from __future__ import annotations

from enum import Enum
from typing import Annotated, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from fedfmsl.algorithms.privacy import Privacy
from fedfmsl.algorithms.sal import Sal
from fedfmsl.errors import MessageError, one_line
from fedfmsl.protocol.topics import MAX_NUMBER, NAME

Name = Annotated[str, Field(pattern=f"^{NAME}$")]  # of a run or a device
Session = Annotated[str, Field(pattern=r"^[0-9A-Za-z-]{1,64}$")]
Sha256 = Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]  # "" where there is none; also a file's name, so checked
Url = Annotated[str, Field(pattern=r"^(https?://[!-~]+)?$", max_length=2048)]
Key = Annotated[str, Field(pattern=r"^[0-9A-Za-z._-]{1,64}$")]
Text = Annotated[str, AfterValidator(one_line)]  # for people; what is too long for a line is cut off, not refused
Number = Annotated[int, Field(ge=0, le=MAX_NUMBER)]
Positive = Annotated[int, Field(ge=1, le=MAX_NUMBER)]
Level = Annotated[int, Field(ge=0, le=1024)]
Count = Annotated[int, Field(ge=0, le=2**53)]  # exact as a float, too
Amount = Annotated[float, Field(ge=0, le=2**53)]


class Message(BaseModel):
    """`max_bytes`: of its JSON, where it travels alone."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    max_bytes: ClassVar[int] = 64 * 1024


class Stage(str, Enum):
    """What a round asks of a device. `global` and `personal` are the paper's stages 1 and 2, the others are ours."""

    STATISTICS = "statistics"  # class sums of the frozen feature: the head's starting point
    GLOBAL = "global"  # stage 1: train the global expert
    PERSONAL = "personal"  # stage 2: train the local expert and the gate adapter
    BASELINE = "baseline"  # train alone, for comparison; nothing is aggregated
    EVALUATE = "evaluate"  # measure on the test slice, write the personalized model
    FINISHED = "finished"  # nothing more to do


EngineName = Literal["step-graph", "ort-training"]
EngineChoice = Literal["auto", "step-graph", "ort-training"]


class Training(Message):
    """How a device trains an expert in this round, with AdamW. The head is not decayed."""

    epochs: Positive
    batch_size: Positive = 16
    learning_rate: float = Field(gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    seed: Count = 0


class Encoding(str, Enum):
    """How the values of an update travel (see `fedfmsl.protocol.encoding`)."""

    FP32 = "fp32"
    FP16 = "fp16"
    INT8 = "int8"


class ServerStatus(Message):
    """Retained, last will. `session` is made anew for each run of a name, and kept when its server starts again:
    what an earlier run left behind, on the broker or on a device, is told apart by it."""

    online: bool
    run: Name
    session: Session
    bundle: Sha256 = ""
    bundle_url: Url = ""
    model: Text = ""


class Round(Message):
    """The announcement of a round, retained. `expert` (the global expert), `start` (the one it started from)
    and `gate` are the SHA-256 of global blobs ("" = none yet).
    `chosen`: the devices that are asked; none are named where all are."""

    max_bytes = 192 * 1024  # most of it for `chosen`

    run: Name
    session: Session
    round: Number
    stage: Stage
    index: Number  # within its stage, from 0
    of: Number  # rounds of this stage
    repetitions: Positive = 1  # how often a device goes through its local epochs within the round
    level: Level
    chosen: tuple[Name, ...] = Field(default=(), max_length=5000, fail_fast=True)
    expert: Sha256 = ""
    start: Sha256 = ""
    gate: Sha256 = ""
    training: Training
    sal: Sal
    encoding: Encoding = Encoding.FP32
    privacy: Privacy | None = None


class Globals(Message):
    """Header of a blob of global tensors. It names no round: what has not changed keeps its SHA-256."""

    run: Name
    kind: Key


class DeviceStatus(Message):
    """Retained, last will. `instance` is made anew at each start of a device: by it, two with one name are noticed.
    `paused` says why it may not train at present: rounds that open meanwhile do not wait for it."""

    device: Name
    online: bool
    instance: str = Field(default="", max_length=32)
    bundle: Sha256 = ""
    level_cap: Level = 0
    train: Count = 0
    held_out: Count = 0
    test: Count = 0
    paused: Text = ""
    error: Text = ""


class Progress(Message):
    device: Name
    activity: Text
    done: Count
    total: Count


class Activity(str, Enum):
    """What a device is doing."""

    STARTING = "starting"  # fetching the bundle, measuring
    WAITING = "waiting"  # for the server, or for the next round
    WORKING = "working"
    PAUSED = "paused"  # its governor does not let it train
    STOPPED = "stopped"


HEALTH_SECONDS = 60.0  # from one to the next, while nothing changes


class Health(Message):
    """Retained. How a device is, for whoever looks after it; nothing in a run depends on it. `time` and `started` are
    unix seconds, sizes bytes, temperatures °C; `others` is the share of the processors that others use, `slowdown` how
    much longer a training step takes than when it was measured. `paused` says why it is."""

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
    skipped: Count = 0
    unacknowledged: Count = 0
    rounds_done: Count = 0


class Prediction(Message):
    """What the personalized model says of one file, retained. `label` is a class, or `unknown`; `round` is the one that
    the model is of; `probabilities` are calibrated."""

    max_bytes = 192 * 1024  # most of it for `probabilities`

    device: Name
    file: Text
    time: Amount
    label: Text
    confidence: float = Field(ge=0, le=1)
    probabilities: dict[Text, float] = Field(max_length=4096)
    round: Number


class Update(Message):
    """Header of a client update: the trained values less the globals that the round named (statistics: the sums
    themselves). `samples` weighs it; `level` is the level it was trained at."""

    run: Name
    session: Session
    round: Number
    device: Name
    stage: Stage
    level: Level
    samples: Count
    metrics: dict[Key, float] = Field(default={}, max_length=64)
    counts: dict[Key, Annotated[list[Count], Field(max_length=4096, fail_fast=True)]] = Field(default={}, max_length=16)
    engine: str = Field(default="", max_length=32)
    seconds: Amount = 0.0
    peak_rss_mb: Amount = 0.0
    bytes_down: Count = 0


class Verdict(str, Enum):
    ACCEPTED = "accepted"
    DUPLICATE = "duplicate"
    LATE = "late"
    REJECTED = "rejected"


class Ack(Message):
    """The server's word on an update."""

    run: Name
    session: Session
    round: Number
    device: Name
    verdict: Verdict
    reason: Text = ""


M = TypeVar("M", bound=Message)


def parse(message_type: type[M], payload: bytes) -> M:
    """Raises MessageError if the payload is longer than the type's `max_bytes` or not a valid message of that type."""
    if len(payload) > message_type.max_bytes:
        raise MessageError(f"{message_type.__name__} of {len(payload)} bytes: more than {message_type.max_bytes}")
    try:
        return message_type.model_validate_json(payload)
    except ValidationError as error:
        raise MessageError(f"not a valid {message_type.__name__}: {first_of(error)}") from None


def first_of(error: ValidationError) -> str:
    """The first thing that is wrong, in one line; of very many, only how many: to list them takes megabytes."""
    if error.error_count() > 100:
        return f"{error.error_count()} errors"
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or "payload"
    return one_line(f"{where}: {first['msg']}")


def encode(message: Message) -> bytes:
    return message.model_dump_json().encode()
