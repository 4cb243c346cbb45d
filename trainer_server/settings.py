"""The settings of the server. See `fedfmsl.common.settings` for flags, variables and the TOML file."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from fedfmsl.algorithms.privacy import Privacy
from fedfmsl.algorithms.sal import CapabilityQueue
from fedfmsl.common.hours import Hours
from fedfmsl.common.logs import LogSettings
from fedfmsl.common.settings import CommaSeparated, File, Fraction, checked, panel
from fedfmsl.errors import ConfigError
from fedfmsl.protocol.messages import Training
from fedfmsl.protocol.task_bundle import TaskBundle
from fedfmsl.protocol.topics import check_name
from fedfmsl.transport.settings import (
    CONNECTION,
    HOME_ASSISTANT,
    AccessSettings,
    ConnectionSettings,
    DiscoveryPrefix,
    MetricsAddress,
    PageAddress,
    Reachable,
    RunName,
)
from trainer_server.config import (
    AGGREGATION,
    AGGREGATION_DEFAULT,
    PRIVACY,
    ROUNDS,
    RUN,
    STAGE1,
    STAGE2,
    UPDATES,
    Aggregation,
    Every,
    Head,
    Optimizer,
    Positive,
    Rule,
    RunConfig,
    RunRules,
    Trigger,
    highest_level,
    sal_rules,
)
from trainer_server.coordinator.limits import Limits, least_updates
from trainer_server.task_settings import TaskSettings
from trainer_server.tracking.sinks import parse

TRAINING = panel("Training on the devices")
CONSOLE = panel("Console")
LISTS = (".txt", ".csv", ".lst", ".list")  # of files; a name of a device may have another dot
Trackers = Annotated[tuple[Annotated[str, checked(parse)], ...], CommaSeparated]


class ConsoleAccess(AccessSettings):
    """Who may use the console."""

    revoked: File | None = Field(
        None,
        description="Revocation list in PEM for --serve and --console. Default: revoked.crl beside --identity, or in "
        "the kit there.",
        json_schema_extra=CONNECTION,
    )
    console_token: File | None = Field(
        None,
        description="File with the token that opens the console; it is made if it does not exist. Default: "
        "console.token in the folder of the run; none on a loopback address.",
        json_schema_extra=CONSOLE,
    )


class ConsoleSettings(ConsoleAccess, LogSettings):
    """What the command `console` needs."""

    out: File = Field(
        description="Folder of a run, or a folder with the folders of several runs.", json_schema_extra=RUN
    )
    console: PageAddress = Field(
        "127.0.0.1:8090",
        description="HOST:PORT of the console. Other addresses than loopback need --identity, for HTTPS.",
        json_schema_extra=CONSOLE,
    )


class ServiceSettings(ConnectionSettings, LogSettings, ConsoleAccess):
    """How the server is reached, and where it logs to."""

    serve: Reachable | None = Field(
        None, description="HOST:PORT where devices without the bundle download it.", json_schema_extra=CONNECTION
    )
    allow: str | None = Field(
        None,
        description="Devices that may take part: names with commas, or a file with one name per line. "
        "Default: all that the broker lets in.",
        json_schema_extra=CONNECTION,
    )

    console: PageAddress | None = Field(
        None,
        description="HOST:PORT of the operator's console, a web page of this run, like 127.0.0.1:8090. Other addresses "
        "than loopback need --identity, for HTTPS. Default: no console.",
        json_schema_extra=CONSOLE,
    )
    metrics: MetricsAddress | None = Field(
        None, description="HOST:PORT to serve Prometheus metrics on. Default: none.", json_schema_extra=CONNECTION
    )
    track: Trackers = Field(
        (),
        description="Trackers that get the figures of every round: tensorboard:DIR, mlflow:URI, wandb:PROJECT.",
        json_schema_extra=CONNECTION,
    )

    @model_validator(mode="after")
    def _check_effect(self) -> ServiceSettings:
        if self.revoked is not None and self.identity is None:
            raise ValueError("--revoked has no effect without --identity: devices show no certificate; add it")
        if self.console_token is not None and self.console is None:
            raise ValueError("--console-token has no effect without --console; add --console HOST:PORT")
        return self

    @cached_property
    def allowed(self) -> frozenset[str] | None:
        """The devices of `allow`; None if all are allowed. Raises ConfigError."""
        if self.allow is None:
            return None
        path = Path(self.allow).expanduser()
        try:
            if not path.is_file() and (os.sep in self.allow or path.suffix in LISTS):
                raise ConfigError("there is no such file")
            names = path.read_text("utf-8").split() if path.is_file() else self.allow.split(",")
            found = frozenset(check_name("device", name.strip()) for name in names)
            if not found:
                raise ConfigError("the file names no device")
        except (OSError, UnicodeDecodeError, ConfigError) as error:
            why = getattr(error, "strerror", None) or error
            raise ConfigError(
                f"--allow {self.allow!r}: {why}; give names like kitchen,balcony or a file with one per line"
            ) from error
        return found


class ResumeSettings(ServiceSettings):
    """What the command `resume` needs. The run's configuration is stored in its folder; it may change `Limits`."""

    out: File = Field(description="Folder of the run.", json_schema_extra=RUN)
    round_timeout: float | None = Field(
        None, gt=0, description="Seconds until the round deadline. Default: as stored.", json_schema_extra=ROUNDS
    )
    min_updates: int | None = Field(
        None,
        ge=1,
        description="Number of updates below which a round lasts longer or is repeated. Default: as stored.",
        json_schema_extra=UPDATES,
    )
    max_repeats: int | None = Field(
        None,
        ge=0,
        description="Consecutive repeats after which the run fails. Default: as stored.",
        json_schema_extra=UPDATES,
    )
    enough: Fraction | None = Field(
        None,
        description="Share of the selected devices whose updates close a round. Default: as stored.",
        json_schema_extra=UPDATES,
    )
    schedule: Annotated[tuple[Hours, ...] | None, CommaSeparated] = Field(
        None,
        description="Hours in which rounds open and close; 00:00-24:00: always. Default: as stored.",
        json_schema_extra=ROUNDS,
    )
    every: Every | None = Field(
        None,
        description="Least time between the begins of two sessions, like 24h. Default: as stored.",
        json_schema_extra=ROUNDS,
    )
    min_new: int | None = Field(
        None,
        ge=1,
        description="New labelled samples that a session of a standing run begins with. Default: as stored.",
        json_schema_extra=ROUNDS,
    )

    @property
    def changes(self) -> dict[str, Any]:
        """The limits that change."""
        return {key: value for key in Limits.model_fields if (value := getattr(self, key)) is not None}


class PurgeSettings(ConnectionSettings):
    """What the command `purge` needs."""

    run: RunName = Field(description="Name of the run.", json_schema_extra=RUN)
    home_assistant: DiscoveryPrefix = Field(
        HOME_ASSISTANT,
        description="Discovery prefix of Home Assistant, where the devices are announced. Empty: they are not.",
        json_schema_extra=CONNECTION,
    )


class ServerSettings(ServiceSettings, TaskSettings, RunRules):
    """What the command `start` needs."""

    bundle: File = Field(description="Bundle folder.", json_schema_extra=RUN)
    out: File | None = Field(None, description="Folder of the run. Default: runs/RUN/server.", json_schema_extra=RUN)

    epochs: int = Field(
        STAGE1.epochs, ge=1, description="Local epochs in a round of stage 1.", json_schema_extra=TRAINING
    )
    batch_size: int = Field(
        STAGE1.batch_size, ge=1, description="Samples in one training step.", json_schema_extra=TRAINING
    )
    learning_rate: Positive = Field(
        STAGE1.learning_rate, description="Learning rate of AdamW in stage 1.", json_schema_extra=TRAINING
    )
    local_learning_rate: Positive = Field(
        STAGE2.learning_rate, description="Learning rate of AdamW in stage 2.", json_schema_extra=TRAINING
    )

    sal: Trigger = Field(
        Trigger.CAPABILITY_QUEUE, description="Rule that activates more blocks.", json_schema_extra=ROUNDS
    )
    sal_min_gain: float = Field(
        CapabilityQueue().min_gain,
        ge=0,
        description="Relative accuracy gain below which SAL activates more blocks. Half of it in stage 2.",
        json_schema_extra=ROUNDS,
    )
    max_level: int | None = Field(
        None, ge=1, description="Highest level. Default: the bundle's.", json_schema_extra=ROUNDS
    )

    rule: Rule | None = Field(
        None,
        description="Aggregation rule. screened-mean leaves out updates that point away from the others; it, "
        "trimmed-mean and median withstand a minority of hostile devices from three updates on; mean does not. The "
        "first and the last are weighted by samples. Default: screened-mean; with --dp-noise or --secure mean.",
        json_schema_extra=AGGREGATION,
    )
    trim: float = Field(
        AGGREGATION_DEFAULT.trim,
        ge=0,
        lt=0.5,
        description="Share that trimmed-mean drops at each end; of three or more updates at least one, unless it is 0.",
        json_schema_extra=AGGREGATION,
    )
    clip: Positive | None = Field(
        None,
        description="L2 norm that updates are clipped to. Default: no clipping.",
        json_schema_extra=AGGREGATION,
    )
    server_optimizer: Optimizer = Field(
        AGGREGATION_DEFAULT.optimizer,
        description="Server optimizer, which applies the aggregated update.",
        json_schema_extra=AGGREGATION,
    )
    server_learning_rate: Positive = Field(
        AGGREGATION_DEFAULT.learning_rate,
        description="Learning rate of the server optimizer.",
        json_schema_extra=AGGREGATION,
    )

    dp_noise: Positive | None = Field(
        None,
        description="Noise multiplier of DP-FedAvg; needs --dp-clip. Default: no differential privacy.",
        json_schema_extra=PRIVACY,
    )
    dp_clip: Positive | None = Field(
        None, description="L2 norm that devices clip their updates to.", json_schema_extra=PRIVACY
    )

    @model_validator(mode="after")
    def _check_run(self) -> ServerSettings:
        if (self.dp_noise is None) != (self.dp_clip is None):
            raise ValueError("--dp-noise and --dp-clip need each other; give both or none")
        try:
            self._config(self.max_level or 1)
        except ValidationError as error:
            raise ValueError(error.errors()[0]["msg"].removeprefix("Value error, ")) from error
        return self

    @property
    def folder(self) -> Path:
        return self.out or Path("runs") / self.run / "server"

    def run_config(self, bundle: TaskBundle) -> RunConfig:
        """The configuration of a run with this bundle and task. Raises ConfigError if they do not support it."""
        max_level = highest_level(bundle, self.max_level)
        if self.head is Head.ZERO_SHOT and bundle.task.zero_shot is None:
            raise ConfigError(
                f"--head zero-shot: the task of {bundle.manifest.model} has no such head; make one of clip-vit-b16 "
                "with python -m export.task, or choose class-means"
            )
        return self._config(max_level)

    def _config(self, max_level: int) -> RunConfig:
        rules = {key: getattr(self, key) for key in RunRules.model_fields}
        stage1_sal, stage2_sal = sal_rules(self.sal, self.sal_min_gain, max_level)
        privacy = None
        if self.dp_noise is not None and self.dp_clip is not None:
            privacy = Privacy(clip=self.dp_clip, noise_multiplier=self.dp_noise, shares=least_updates(self))
        return RunConfig(
            **rules,
            stage1=self._training(self.epochs, self.learning_rate),
            stage2=self._training(STAGE2.epochs, self.local_learning_rate),
            stage1_sal=stage1_sal,
            stage2_sal=stage2_sal,
            aggregation=Aggregation(
                rule=self.rule or (Rule.MEAN if privacy or self.secure else AGGREGATION_DEFAULT.rule),
                trim=self.trim,
                clip=self.clip,
                optimizer=self.server_optimizer,
                learning_rate=self.server_learning_rate,
            ),
            privacy=privacy,
        )

    def _training(self, epochs: int, learning_rate: float) -> Training:
        return Training(epochs=epochs, batch_size=self.batch_size, learning_rate=learning_rate, seed=self.seed)
