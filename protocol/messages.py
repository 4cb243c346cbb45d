"""Every message of the wire, as a pydantic model. Times are unix seconds; accuracies are shares of one."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from protocol.errors import MessageError


class Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


Sha256 = Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]  # "" where there is none; also a file's name, so checked


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

    epochs: int = Field(ge=1)
    batch_size: int = Field(default=16, ge=1)
    learning_rate: float = Field(gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    seed: int = 0


class Trigger(str, Enum):
    """What makes SAL activate more blocks (see `protocol.sal`)."""

    CAPABILITY_QUEUE = "capability-queue"
    FIXED_SCHEDULE = "fixed-schedule"
    ALL_AT_ONCE = "all-at-once"  # plain LoRA, the ablation


class Sal(Message):
    """When to activate more blocks: server and devices follow the same rule."""

    trigger: Trigger = Trigger.CAPABILITY_QUEUE
    window: int = Field(ge=2)
    epsilon: float = Field(ge=0)
    step: int = Field(ge=1)
    max_level: int = Field(ge=1)


class Encoding(str, Enum):
    """How the values of an update travel (see `protocol.encoding`)."""

    FP32 = "fp32"
    FP16 = "fp16"
    INT8 = "int8"


class Privacy(Message):
    """DP-FedAvg, noised on the devices (ours): an update is clipped to L2 norm `clip` and gets Gaussian noise of
    standard deviation noise_multiplier · clip / √shares; `shares` is the least number of updates in an aggregate."""

    clip: float = Field(gt=0)
    noise_multiplier: float = Field(gt=0)
    shares: int = Field(ge=1)


class ServerStatus(Message):
    """Retained, last will. `session` is made anew for each run of a name, and kept when its server starts again:
    what an earlier run left behind, on the broker or on a device, is told apart by it."""

    online: bool
    run: str
    session: str
    bundle: Sha256 = ""
    bundle_url: str = ""
    model: str = ""


class Round(Message):
    """The announcement of a round, retained. `expert` (the global expert), `start` (the one it started from)
    and `gate` are the SHA-256 of global blobs ("" = none yet). `seconds`: how long answers are waited for.
    `chosen`: the devices that are asked; none are named where all are."""

    run: str
    session: str
    round: int
    stage: Stage
    index: int  # within its stage, from 0
    of: int  # rounds of this stage
    repetitions: int = 1  # how often a device goes through its local epochs within the round
    level: int
    seconds: float
    chosen: tuple[str, ...] = ()
    expert: Sha256 = ""
    start: Sha256 = ""
    gate: Sha256 = ""
    training: Training
    sal: Sal
    encoding: Encoding = Encoding.FP32
    privacy: Privacy | None = None


class Globals(Message):
    """Header of a blob of global tensors. It names no round: what has not changed keeps its SHA-256."""

    run: str
    kind: str


class DeviceStatus(Message):
    """Retained, last will. `instance` is made anew at each start of a device: by it, two with one name are noticed."""

    device: str
    online: bool
    instance: str = Field(default="", max_length=32)
    bundle: Sha256 = ""
    level_cap: int = 0
    train: int = 0
    held_out: int = 0
    test: int = 0
    error: str = ""


class Progress(Message):
    device: str
    activity: str
    done: int
    total: int


class Update(Message):
    """Header of a client update: the trained values less the globals that the round named (statistics: the sums
    themselves). `samples` weighs it (exactly, as a float); `level` is the level it was trained at."""

    run: str
    session: str
    round: int
    device: str
    stage: Stage
    level: int = Field(ge=0)
    samples: int = Field(ge=0, le=2**53)
    metrics: dict[str, float] = {}
    counts: dict[str, list[int]] = {}
    engine: str = ""
    seconds: float = Field(default=0.0, ge=0)
    peak_rss_mb: float = Field(default=0.0, ge=0)
    bytes_down: int = Field(default=0, ge=0)


class Verdict(str, Enum):
    ACCEPTED = "accepted"
    DUPLICATE = "duplicate"
    LATE = "late"
    REJECTED = "rejected"


class Ack(Message):
    """The server's word on an update."""

    run: str
    session: str
    round: int
    device: str
    verdict: Verdict
    reason: str = ""


M = TypeVar("M", bound=Message)


def parse(message_type: type[M], payload: bytes, cap: int = 64 * 1024) -> M:
    """Raises MessageError if the payload is longer than `cap` bytes or not a valid message of that type."""
    if len(payload) > cap:
        raise MessageError(f"{message_type.__name__} of {len(payload)} bytes: more than {cap}")
    try:
        return message_type.model_validate_json(payload)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "payload"
        raise MessageError(f"not a valid {message_type.__name__}: {where}: {first['msg']}") from error


def encode(message: Message) -> bytes:
    return message.model_dump_json().encode()
