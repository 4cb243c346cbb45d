"""The configuration of a run: what the coordinator follows and the server stores."""

from __future__ import annotations

import re
from enum import Enum
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_settings import SettingsConfigDict

from fedfmsl.algorithms.aggregation import AggregationRule, CoordinateMedian, ScreenedMean, TrimmedMean, WeightedMean
from fedfmsl.algorithms.bounds import NORM_FACTOR, WEIGHT_CAP
from fedfmsl.algorithms.privacy import Privacy
from fedfmsl.algorithms.sal import AllAtOnce, CapabilityQueue, FixedSchedule, Sal
from fedfmsl.algorithms.secure_aggregation import MIN_DEVICES
from fedfmsl.algorithms.server_optimizers import FedAdam, FedAvg, FedAvgM, ServerOptimizer
from fedfmsl.common.duration import seconds_of
from fedfmsl.common.hours import Hours
from fedfmsl.common.settings import CommaSeparated, Fraction, checked, panel
from fedfmsl.errors import ConfigError
from fedfmsl.protocol.messages import MAX_NAMED, Encoding, Sums, Training
from fedfmsl.protocol.task_bundle import TaskBundle
from fedfmsl.protocol.topics import MAX_NUMBER
from fedfmsl.transport.settings import RunName
from trainer_server.defaults import MAX_DEVICES, MAX_ROUNDS, STAGE1_ROUNDS, STAGE2_ROUNDS

RUN, ROUNDS, UPDATES, AGGREGATION, ADOPTION, PRIVACY = (
    panel(name)
    for name in ("Run", "Rounds", "Which updates count", "Aggregation", "Adoption of the global expert", "Privacy")
)


MIN_REPORTS = 3  # of devices about a global expert; with fewer, one could decide
MOST_DEVICES = 2500  # that a run accepts although it expects fewer


class Head(str, Enum):
    """The head that stage 1 starts from: zeros, class means of the devices' features, or text embeddings of the class
    names."""

    ZEROS = "zeros"
    CLASS_MEANS = "class-means"
    ZERO_SHOT = "zero-shot"


class Selection(str, Enum):
    """Which online devices a training round asks."""

    ALL = "all"
    RANDOM = "random"  # a random share of them in each round
    CAPABLE = "capable"  # those that can train the round's level


class Rule(str, Enum):
    """Aggregation rules. The means are weighted by samples; the others give every update the same weight."""

    SCREENED_MEAN = "screened-mean"
    MEAN = "mean"
    TRIMMED_MEAN = "trimmed-mean"
    MEDIAN = "median"


class Optimizer(str, Enum):
    """Server optimizers (Reddi et al., ICLR 2021)."""

    FEDAVG = "fedavg"
    FEDAVGM = "fedavgm"
    FEDADAM = "fedadam"


Positive = Annotated[float, Field(gt=0)]


def _number_as_text(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _check_canary(text: str) -> str:
    found = re.fullmatch(r"([0-9]{1,4})(%?)", text.strip())
    number, is_share = (int(found[1]), bool(found[2])) if found else (0, False)
    if not (1 <= number <= 100 if is_share else number >= MIN_REPORTS):
        raise ValueError(
            f"is neither a share like 10% nor a number of at least {MIN_REPORTS} devices; with fewer, one could decide"
        )
    return text.strip()


Every = Annotated[str, checked(seconds_of)]
Canary = Annotated[str, BeforeValidator(_number_as_text), AfterValidator(_check_canary)]


def _check_approval(text: str) -> str:
    if not re.fullmatch(r"min-devices=[1-9][0-9]{0,5}", text):
        raise ValueError("is not like min-devices=2, which adds the classes that two devices propose")
    return text


Approval = Annotated[str, AfterValidator(_check_approval)]


class Aggregation(BaseModel):
    """How updates are combined and applied. `fedfmsl.algorithms` defines defaults and bounds.

    `trim`: the share of updates that the trimmed mean drops at each end. `clip`: the L2 norm that updates are clipped
    to; None: no clipping. `norm_factor` and `weight_cap`: the norm and the weight of an update, relative to the medians
    of the round, above which it is scaled down (`fedfmsl.algorithms.bounds`); None: no bound. The server optimizer uses
    `learning_rate`, `momentum` (FedAvgM; β₁ of FedAdam), `beta2` and `tau` (FedAdam).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rule: Rule = Rule.SCREENED_MEAN
    trim: float = TrimmedMean.trim
    clip: float | None = None
    norm_factor: float | None = NORM_FACTOR
    weight_cap: float | None = WEIGHT_CAP
    optimizer: Optimizer = Optimizer.FEDAVG
    learning_rate: float = FedAvg.learning_rate
    momentum: float = FedAvgM.momentum
    beta2: float = FedAdam.beta2
    tau: float = FedAdam.tau

    @model_validator(mode="after")
    def _check_bounds(self) -> Aggregation:
        TrimmedMean(trim=self.trim, clip=self.clip)
        FedAdam(learning_rate=self.learning_rate, beta1=self.momentum, beta2=self.beta2, tau=self.tau)
        return self

    @property
    def aggregation_rule(self) -> AggregationRule:
        if self.rule is Rule.SCREENED_MEAN:
            return ScreenedMean(clip=self.clip)
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


class RunRules(BaseModel):
    """The settings that the coordinator uses without conversion. Times in seconds."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid")

    run: RunName = Field(description="Name of the run. Devices use the same name.", json_schema_extra=RUN)
    devices: int = Field(
        ge=1, le=MAX_DEVICES, description="Number of devices to wait for before the run starts.", json_schema_extra=RUN
    )
    join_timeout: float = Field(
        600.0,
        gt=0,
        description="Seconds to wait for devices. Then the run starts with those that are online.",
        json_schema_extra=RUN,
    )
    seed: int = Field(0, ge=0, description="Seed of the run.", json_schema_extra=RUN)
    audit: bool = Field(
        False, description="Keep the updates, so that `replay` can check the run.", json_schema_extra=RUN
    )
    keep_rounds: int = Field(
        10_000,
        ge=1,
        description="Number of latest closed rounds whose records are kept; with --audit also their updates.",
        json_schema_extra=RUN,
    )

    approve_classes: Approval | None = Field(
        None,
        description="Add the classes that so many devices propose, like min-devices=2. Default: the operator adds "
        "classes, with the command classes or on the console.",
        json_schema_extra=RUN,
    )
    schedule: Annotated[tuple[Hours, ...], CommaSeparated] = Field(
        (),
        description="Hours of the server's local time in which rounds open and close, like 22:00-06:00 or Sat-Sun "
        "10:00-18:00; several with commas. Outside of them the run rests. The run is then standing: after its last "
        "round it begins again once there are new samples. Default: always.",
        json_schema_extra=ROUNDS,
    )
    every: Every | None = Field(
        None,
        description="Least time between the begins of two sessions, like 24h, 90m or 7d. The run is then standing, as "
        "with --schedule. Default: none.",
        json_schema_extra=ROUNDS,
    )
    min_new: int = Field(
        1,
        ge=1,
        description="New labelled samples, on all devices together, that a session of a standing run begins with.",
        json_schema_extra=ROUNDS,
    )
    stage1_rounds: int = Field(
        STAGE1_ROUNDS,
        ge=0,
        le=MAX_ROUNDS,
        description="Rounds of stage 1. 0 only with --from: stage 2 then starts at once.",
        json_schema_extra=ROUNDS,
    )
    stage2_rounds: int = Field(
        STAGE2_ROUNDS, ge=1, le=MAX_ROUNDS, description="Rounds of stage 2.", json_schema_extra=ROUNDS
    )
    round_timeout: float = Field(
        600.0,
        gt=0,
        description="Seconds until the round deadline. A round with too few updates lasts up to 16 times as long while "
        "devices are at work.",
        json_schema_extra=ROUNDS,
    )
    head: Head = Field(
        Head.ZEROS,
        description="Head that stage 1 starts from. class-means reveals who took part; zero-shot needs a CLIP bundle.",
        json_schema_extra=ROUNDS,
    )
    baseline: bool = Field(
        False, description="Also train every device alone, for comparison.", json_schema_extra=ROUNDS
    )

    min_updates: int | None = Field(
        None,
        ge=1,
        description="Number of updates below which a round lasts longer or is repeated. Default: half of those that a "
        "round waits for (--devices × --fraction × --enough), rounded up. With --secure at least 3.",
        json_schema_extra=UPDATES,
    )
    max_repeats: int | None = Field(
        None,
        ge=0,
        description="Consecutive repeats after which the run fails. Default: no limit.",
        json_schema_extra=UPDATES,
    )
    enough: Fraction = Field(
        1.0, description="Share of the selected devices whose updates close a round.", json_schema_extra=UPDATES
    )
    select: Selection = Field(
        Selection.ALL, description="Client selection: which devices a training round asks.", json_schema_extra=UPDATES
    )
    fraction: Fraction = Field(1.0, description="Share that --select random draws.", json_schema_extra=UPDATES)
    max_staleness: int = Field(
        0,
        ge=0,
        description="Rounds that an update may be late and still count, with a lower weight (FedBuff). 0: none.",
        json_schema_extra=UPDATES,
    )
    max_norm: float = Field(
        1000.0, gt=0, description="L2 norm above which an update is refused.", json_schema_extra=UPDATES
    )
    max_samples: int = Field(
        1_000_000, ge=1, description="Sample count above which an update is refused.", json_schema_extra=UPDATES
    )

    max_loss: Positive = Field(
        0.3,
        description="Nats of held-out likelihood that a device may lose with a new global expert. The devices measure "
        "it with the round that follows. Not with --secure or --dp-noise.",
        json_schema_extra=ADOPTION,
    )
    max_regressed: Fraction = Field(
        0.5,
        description="Share of the devices that may lose more than --max-loss; if more do, the last good global expert "
        "comes back. At least two and all but one have to agree. 1: no global expert is rejected.",
        json_schema_extra=ADOPTION,
    )
    canary: Canary | None = Field(
        None,
        description="Share (10%) or number (at least 3) of devices that measure the global expert of stage 1 in a "
        "round of its own before all others receive it. Default: none; all devices measure it with their updates.",
        json_schema_extra=ADOPTION,
    )

    encoding: Encoding = Field(
        Encoding.FP32,
        description="Encoding of updates on the wire. int8 uses error feedback.",
        json_schema_extra=AGGREGATION,
    )
    secure: bool = Field(
        False,
        description="Secure aggregation of all updates and sums: the server learns no single device's. Excludes every "
        "--rule but mean, --clip, --encoding and --max-staleness.",
        json_schema_extra=PRIVACY,
    )
    secure_sums: bool = Field(
        True,
        description="Secure aggregation of the class sums: the server learns no single device's. With fewer than three "
        "devices there are no class sums. A run with --dp-noise adds noise to them instead.",
        json_schema_extra=PRIVACY,
    )
    head_sums: Sums = Field(
        Sums.LOGITS,
        description="What devices sum for the head after stage 1. features reveal more about photos than logits; none: "
        "the head stays as trained.",
        json_schema_extra=PRIVACY,
    )
    min_class_count: int = Field(
        10,
        ge=1,
        le=MAX_NUMBER,
        description="Samples from which a class enters the sums: on all devices together, or on the device with "
        "--no-secure-sums.",
        json_schema_extra=PRIVACY,
    )
    min_holders: int = Field(
        1, ge=1, description="Devices that must hold a class for its secure sum.", json_schema_extra=PRIVACY
    )
    delta: float = Field(1e-5, gt=0, lt=1, description="δ of the reported privacy budget ε.", json_schema_extra=PRIVACY)

    @property
    def most_devices(self) -> int:
        """The number of devices that the run accepts. More names are no devices of it."""
        return max(2 * self.devices, MOST_DEVICES)

    @property
    def standing(self) -> bool:
        """Whether the run begins again after its last round (`trainer_server.coordinator.standing`)."""
        return bool(self.schedule) or self.every is not None

    @model_validator(mode="after")
    def _check_updates(self) -> RunRules:
        if self.min_new > 1 and not self.standing:
            raise ValueError(f"--min-new {self.min_new} needs --schedule or --every: other runs do not begin again")
        if self.min_updates is not None and self.min_updates > self.devices:
            raise ValueError(
                f"--min-updates {self.min_updates} is more than --devices {self.devices}: no round could close; lower "
                "it, or wait for more devices"
            )
        if self.baseline and not self.stage1_rounds:
            raise ValueError("--baseline trains for as many rounds as stage 1, not for --stage1-rounds 0; omit one")
        if self.fraction < 1 and self.select is not Selection.RANDOM:
            raise ValueError(f"--fraction {self.fraction:g} needs --select random, not {self.select.value}")
        return self


AGGREGATION_DEFAULT = Aggregation()
ROBUST_FROM = 3  # updates, below which robust rules equal the mean
STAGE1 = Training(epochs=2, learning_rate=1e-3)
STAGE2 = Training(epochs=1, learning_rate=1e-4)


class RunConfig(RunRules):
    """The configuration of a run, as its server stores it.

    A training round asks the devices that `select` picks. It closes when the share `enough` of them has answered, or at
    the round deadline. With fewer than `min_updates` it lasts longer or is repeated. With `max_staleness` 0 an update
    for a closed round is late; otherwise it counts with a lower weight in the current round, up to that age (FedBuff).
    """

    stage1: Training = STAGE1
    stage2: Training = STAGE2
    stage1_sal: Sal
    stage2_sal: Sal
    aggregation: Aggregation = AGGREGATION_DEFAULT
    privacy: Privacy | None = None

    @model_validator(mode="before")
    @classmethod
    def _choose_rule(cls, settings: Any) -> Any:
        """Without a choice, a run whose server sees sums or noisy updates only has the mean."""
        if isinstance(settings, dict) and (settings.get("secure") or settings.get("privacy")):
            return {"aggregation": Aggregation(rule=Rule.MEAN), **settings}
        return settings

    @property
    def replaces_head(self) -> bool:
        """Whether sums of all devices replace the head of stage 1. Noise would drown their second moments."""
        return self.stage1_rounds > 0 and self.privacy is None and self.head_sums is not Sums.NONE

    @property
    def exposure(self) -> str:
        """Why one hostile device could steer this run; "" if the aggregation rule withstands a minority of them."""
        aggregation = self.aggregation
        if aggregation.rule is Rule.MEAN or (aggregation.rule is Rule.TRIMMED_MEAN and not aggregation.trim):
            what = "--dp-noise" if self.privacy else "--secure" if self.secure else f"--rule {aggregation.rule.value}"
            what += ": every"
            return f"{what} update counts in the mean, so one hostile device can bias it in every round"
        if self.devices < ROBUST_FROM:
            return f"--rule {aggregation.rule.value} leaves out nothing of fewer than {ROBUST_FROM} updates"
        return ""

    @property
    def lacks_sums(self) -> str:
        """What the run does without class sums, because it expects too few devices for secure ones; "" if it has them
        or needs none."""
        is_secure = self.secure_sums and self.privacy is None
        lacks = [
            *(["stage 1 starts from the bundle's own head"] if self.head is not Head.ZEROS else []),
            *(["the global expert keeps the head of stage 1"] if self.replaces_head else []),
        ]
        if not is_secure or self.devices >= MIN_DEVICES or not lacks:
            return ""
        few = f"--devices {self.devices}: class sums need {MIN_DEVICES} devices"
        return f"{few}; while there are fewer, {' and '.join(lacks)}"

    @model_validator(mode="after")
    def _check_secure(self) -> RunConfig:
        excluded = {
            f"--rule {self.aggregation.rule.value}": self.aggregation.rule is not Rule.MEAN,
            "--clip": self.aggregation.clip is not None,
            "--max-staleness": self.max_staleness > 0,
            f"--encoding {self.encoding.value}": self.encoding is not Encoding.FP32,
        }
        found = [option for option, is_set in excluded.items() if is_set]
        if self.secure and found:
            raise ValueError(f"with --secure the server sees no single update: leave out {', '.join(found)}")
        asked = int(self.fraction * self.devices)
        if self.secure and asked > MAX_NAMED:
            raise ValueError(
                f"--secure sums the updates of at most {MAX_NAMED} devices, and a round would ask {asked}: ask fewer "
                f"with --select random --fraction {100 * MAX_NAMED // self.devices / 100}, or omit --secure"
            )
        if self.secure and self.devices < MIN_DEVICES:
            raise ValueError(f"--secure needs at least {MIN_DEVICES} devices, not --devices {self.devices}")
        return self

    @model_validator(mode="after")
    def _check_canary(self) -> RunConfig:
        if self.canary is not None and (self.secure or self.privacy):
            option = "--secure" if self.secure else "--dp-noise"
            raise ValueError(f"with {option} devices report no likelihoods of single devices: leave out --canary")
        return self

    @model_validator(mode="after")
    def _check_privacy(self) -> RunConfig:
        if self.privacy is None:
            return self
        if self.aggregation.rule is not Rule.MEAN or self.aggregation.clip or self.max_staleness:
            raise ValueError(
                "privacy is accounted for the plain mean of updates in time: with --dp-noise leave out --rule, --clip "
                "and --max-staleness"
            )
        if self.encoding is not Encoding.FP32:
            raise ValueError("privacy is accounted for unrounded updates: with --dp-noise leave out --encoding")
        if self.min_holders > 1:
            raise ValueError(
                "the holders of a class are counted without noise: with --dp-noise leave out --min-holders"
            )
        if any(isinstance(sal.trigger, CapabilityQueue) for sal in (self.stage1_sal, self.stage2_sal)):
            raise ValueError(
                "with --dp-noise devices do not report accuracies, which SAL's capability queue needs: choose --sal "
                "fixed-schedule or all-at-once"
            )
        return self


def highest_level(bundle: TaskBundle, max_level: int | None) -> int:
    """`max_level`, or the bundle's highest level. Raises ConfigError if the bundle has no such level."""
    levels = bundle.manifest.levels
    if max_level is not None and max_level > levels:
        raise ConfigError(
            f"--max-level {max_level} is more than {levels}, the highest level of the bundle at {bundle.root}; lower "
            "it, or export more levels"
        )
    return max_level or levels


def sal_rules(trigger: Trigger, min_gain: float, max_level: int) -> tuple[Sal, Sal]:
    """SAL of stages 1 and 2. Stage 2 has few rounds, so its queue is shorter and its minimum gain smaller (ours)."""
    return _sal(trigger, 3, min_gain, max_level), _sal(trigger, 2, min_gain / 2, max_level)


def _sal(trigger: Trigger, window: int, min_gain: float, max_level: int) -> Sal:
    if trigger is Trigger.CAPABILITY_QUEUE:
        return Sal(CapabilityQueue(window, min_gain), max_level)
    return Sal(FixedSchedule(window) if trigger is Trigger.FIXED_SCHEDULE else AllAtOnce(), max_level)
