"""What an operator decides about a run."""

from __future__ import annotations

from enum import Enum

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedfmsl.algorithms.aggregation import AggregationRule, CoordinateMedian, TrimmedMean, WeightedMean
from fedfmsl.algorithms.privacy import Privacy
from fedfmsl.algorithms.sal import AllAtOnce, CapabilityQueue, FixedSchedule, Sal
from fedfmsl.algorithms.server_optimizers import FedAdam, FedAvg, FedAvgM, ServerOptimizer
from fedfmsl.protocol.messages import Encoding, Training


class Head(str, Enum):
    """What stage 1 starts from: the class means of the devices' features, the directions that a text tower gives the
    class names, or nothing."""

    CLASS_MEANS = "class-means"
    ZERO_SHOT = "zero-shot"
    ZEROS = "zeros"


class Selection(str, Enum):
    """Which of the devices online a training round asks."""

    ALL = "all"
    RANDOM = "random"  # a share of them, drawn anew for each round
    CAPABLE = "capable"  # those that can train the round's level


class Rule(str, Enum):
    """Aggregation rules. The mean is weighted by samples; the others give every update the same weight."""

    MEAN = "mean"
    TRIMMED_MEAN = "trimmed-mean"
    MEDIAN = "median"


class Optimizer(str, Enum):
    """Server optimizers (Reddi et al., ICLR 2021)."""

    FEDAVG = "fedavg"
    FEDAVGM = "fedavgm"
    FEDADAM = "fedadam"


class Aggregation(BaseModel):
    """`trim`: the share of updates cut off at each end by the trimmed mean. `clip`: the L2 norm that an update is
    scaled down to (none: as it is). `learning_rate`, `momentum` (FedAvgM; β₁ of FedAdam), `beta2` and `tau` (FedAdam's)
    are the server optimizer's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rule: Rule = Rule.MEAN
    trim: float = Field(default=0.1, ge=0, lt=0.5)
    clip: float | None = Field(default=None, gt=0)
    optimizer: Optimizer = Optimizer.FEDAVG
    learning_rate: float = Field(default=1.0, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.99, ge=0, lt=1)
    tau: float = Field(default=1e-3, gt=0)

    @property
    def aggregation_rule(self) -> AggregationRule:
        if self.rule is Rule.TRIMMED_MEAN:
            return TrimmedMean(trim=self.trim, clip=self.clip)
        return CoordinateMedian(clip=self.clip) if self.rule is Rule.MEDIAN else WeightedMean(clip=self.clip)

    @property
    def server_optimizer(self) -> ServerOptimizer:
        if self.optimizer is Optimizer.FEDAVGM:
            return FedAvgM(learning_rate=self.learning_rate, momentum=self.momentum)
        if self.optimizer is Optimizer.FEDADAM:
            return FedAdam(learning_rate=self.learning_rate, beta1=self.momentum, beta2=self.beta2, tau=self.tau)
        return FedAvg(learning_rate=self.learning_rate)


class Trigger(str, Enum):
    """When SAL activates LoRA in more blocks."""

    CAPABILITY_QUEUE = "capability-queue"
    FIXED_SCHEDULE = "fixed-schedule"
    ALL_AT_ONCE = "all-at-once"


def sal_of(trigger: Trigger, *, window: int, min_gain: float, max_level: int) -> Sal:
    if trigger is Trigger.CAPABILITY_QUEUE:
        return Sal(CapabilityQueue(window, min_gain), max_level)
    return Sal(FixedSchedule(window) if trigger is Trigger.FIXED_SCHEDULE else AllAtOnce(), max_level)


class RunConfig(BaseModel):
    """Times in seconds. `devices` are waited for before the run starts, `join_timeout` at the longest.

    A training round asks the devices that `selection` picks (`fraction` of those online where it is random) and closes
    when the share `enough` of them has answered or after `round_timeout`; with fewer than `min_updates` it is repeated,
    `max_repeats` times in a row at most (none: for as long as it takes). With `max_staleness` 0 an update for a closed
    round is late; else it counts, discounted, in the present one if it is at most that many rounds old (FedBuff).

    An update whose L2 norm exceeds `max_norm`, or that claims more than `max_samples`, is refused. `delta` is the δ
    that ε is reported for. With `audit` every update is kept, so that the run can be replayed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: str
    devices: int = Field(ge=1)
    min_updates: int = Field(default=1, ge=1)
    enough: float = Field(default=1.0, gt=0, le=1)
    selection: Selection = Selection.ALL
    fraction: float = Field(default=1.0, gt=0, le=1)
    max_staleness: int = Field(default=0, ge=0)
    join_timeout: float = Field(default=600.0, gt=0)
    round_timeout: float = Field(default=600.0, gt=0)
    max_repeats: int | None = Field(default=None, ge=0)
    max_norm: float = Field(default=1000.0, gt=0)
    max_samples: int = Field(default=1_000_000, ge=1)
    stage1_rounds: int = Field(default=12, ge=1)
    stage2_rounds: int = Field(default=4, ge=1)
    baseline: bool = False
    head: Head = Head.CLASS_MEANS
    stage1: Training = Training(epochs=2, learning_rate=2e-3)
    stage2: Training = Training(epochs=1, learning_rate=5e-4)
    stage1_sal: Sal
    stage2_sal: Sal
    aggregation: Aggregation = Aggregation()
    encoding: Encoding = Encoding.FP32
    privacy: Privacy | None = None
    delta: float = Field(default=1e-5, gt=0, lt=1)
    seed: int = 0
    audit: bool = False

    @model_validator(mode="after")
    def _fit_together(self) -> RunConfig:
        if self.min_updates > self.devices:
            raise ValueError(
                f"a round needs {self.min_updates} updates, but the run starts with {self.devices} devices"
            )
        if self.fraction < 1 and self.selection is not Selection.RANDOM:
            raise ValueError("a fraction of the devices is only drawn by selection random")
        if self.privacy is None:
            return self
        if self.aggregation.rule is not Rule.MEAN or self.aggregation.clip or self.max_staleness:
            raise ValueError("privacy is accounted for the plain mean of updates in time: choose no other rule")
        if self.encoding is not Encoding.FP32:
            raise ValueError("privacy is accounted for updates that are not rounded: choose no encoding")
        if any(isinstance(sal.trigger, CapabilityQueue) for sal in (self.stage1_sal, self.stage2_sal)):
            raise ValueError(
                "under privacy devices do not report accuracies, which SAL's capability queue needs: choose --sal "
                "fixed-schedule or all-at-once"
            )
        return self
