"""The settings of a device. See `fedfmsl.common.settings` for flags, variables and the TOML file."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

from pydantic import ByteSize, Field, model_validator

from edge_runtime.resources.governor import Limits
from fedfmsl.common.hours import Hours
from fedfmsl.common.logs import LogSettings
from fedfmsl.common.processors import usable_processors
from fedfmsl.common.settings import MAX_THREADS, CommaSeparated, File, Fraction, SettingsModel, checked, panel
from fedfmsl.protocol.frigate import check_state_topic
from fedfmsl.protocol.setting_types import EngineChoice
from fedfmsl.transport.listening import parse_reachable
from fedfmsl.transport.settings import (
    CONNECTION,
    HOME_ASSISTANT,
    ConnectionSettings,
    DeviceName,
    DiscoveryPrefix,
    MetricsAddress,
    PageAddress,
    RunName,
)

RUN, SAMPLES, RESOURCES, SCHEDULE, OUTPUT = (
    panel(name) for name in ("Run", "Samples", "Resources", "When the device trains", "Predictions and metrics")
)


FrigateTopic = Annotated[str, checked(check_state_topic)]
AuthorityAddress = Annotated[str, checked(parse_reachable)]


class Secure(str, Enum):
    """What a device sends only as a part of a sum over several devices."""

    OFF = "off"  # nothing
    SUMS = "sums"  # its class sums
    ALL = "all"  # its updates of stages 1 and 2 too


class StateSettings(SettingsModel):
    """The settings of commands that only read the state directory."""

    state: File = Field(Path("device"), description="State directory of the device.", json_schema_extra=RUN)


class PredictSettings(StateSettings, ConnectionSettings):
    """What the command `predict` needs."""

    run: RunName | None = Field(None, description="Name of the run to publish in.", json_schema_extra=RUN)
    bundle: File | None = Field(
        None, description="Bundle folder. Default: the model's, in the state directory.", json_schema_extra=RUN
    )
    home_assistant: DiscoveryPrefix = Field(
        HOME_ASSISTANT,
        description="Discovery prefix of Home Assistant, where predictions are announced. Empty: not announced.",
        json_schema_extra=CONNECTION,
    )


class Settings(PredictSettings, LogSettings):
    """What the daemon needs."""

    run: RunName = Field(description="Name of the run to take part in.", json_schema_extra=RUN)
    device: DeviceName | None = Field(
        None,
        description="Name of this device, at its first start. Default: from its identity, or made from the host name.",
        json_schema_extra=RUN,
    )
    bundle: File | None = Field(
        None, description="Bundle folder. Default: downloaded from the run's server.", json_schema_extra=RUN
    )
    secure: Secure = Field(
        Secure.OFF,
        description="Take part only with secure aggregation: of class sums (sums), of updates too (all). "
        "Default: as the server says.",
        json_schema_extra=RUN,
    )
    max_epsilon: float | None = Field(
        None,
        gt=0,
        description="Privacy budget ε that the updates of all runs may reach, at δ = 1e-5. The device takes no part in "
        "rounds that would pass it, or that have no noise, and sends no accuracies. Default: no limit.",
        json_schema_extra=RUN,
    )
    authority: AuthorityAddress | None = Field(
        None,
        description="HOST:PORT of devices.provision serve, where the device renews its certificate when a third of its "
        "life is left. Default: it is not renewed.",
        json_schema_extra=CONNECTION,
    )
    stay: bool = Field(
        False,
        description="After a run, wait for the next one of the same name. Without it the device stops at the end of a "
        "run, also when it is started again before the next server. Always on with --watch; devices.install sets it.",
        json_schema_extra=RUN,
    )

    images: File = Field(
        description="Folder of images or texts: DIR/<class>/… or DIR/{train,test}/<class>/…", json_schema_extra=SAMPLES
    )
    labels: File | None = Field(
        None,
        description="CSV file with columns `file,class`; paths in the folder. Default: subfolders are classes.",
        json_schema_extra=SAMPLES,
    )

    propose: bool = Field(
        True,
        description="Send the names of class folders that the run does not have, with their numbers of files, so that "
        "the operator can add them.",
        json_schema_extra=SAMPLES,
    )
    rehearse: int = Field(
        0,
        ge=0,
        le=10_000,
        description="Deleted samples of each class that training goes on with, so that the class is not forgotten. "
        "Their hidden states stay in the feature cache; they tell much about a photo.",
        json_schema_extra=SAMPLES,
    )
    engine: EngineChoice = Field(
        "auto",
        description="Training engine. auto: onnxruntime-training if it is installed and the bundle supports it.",
        json_schema_extra=RESOURCES,
    )
    provider: str = Field(
        "auto",
        description="Execution provider of ONNX Runtime, like cpu or cuda, or openvino; cuda-fp16 for its graphs in "
        "float16. auto: the fastest one that agrees with the CPU, measured at the first start.",
        json_schema_extra=RESOURCES,
    )
    threads: int = Field(
        0, ge=0, le=MAX_THREADS, description="Threads for computation. 0: one per core.", json_schema_extra=RESOURCES
    )
    memory: ByteSize | None = Field(
        None,
        gt=0,
        description="Memory limit, like 512MB. Default: half of the machine's memory.",
        json_schema_extra=RESOURCES,
    )
    cache: ByteSize | None = Field(
        None,
        description="Disk limit of the feature cache, like 2GB. Default: half of the free space.",
        json_schema_extra=RESOURCES,
    )
    keep_free: ByteSize = Field(
        ByteSize(500_000_000),
        description="Disk space to keep free. The feature cache shrinks when less is left.",
        json_schema_extra=RESOURCES,
    )
    step_seconds: float = Field(
        60.0,
        ge=0.001,
        le=86_400,
        description="Longest duration of one training step, in seconds. It limits the level.",
        json_schema_extra=RESOURCES,
    )

    hours: Annotated[tuple[Hours, ...], CommaSeparated] = Field(
        (),
        description="Local times when the device may train: 22:00-06:00, or Sat-Sun 08:00-20:00. Default: always.",
        json_schema_extra=SCHEDULE,
    )
    max_temperature: float | None = Field(
        None,
        ge=0,
        le=120,
        description="Temperature in °C above which the device pauses. Default: no limit.",
        json_schema_extra=SCHEDULE,
    )
    thermal_zones: Annotated[tuple[str, ...], CommaSeparated] = Field(
        (),
        description="Types of the thermal zones to read. Default: all with plausible values.",
        json_schema_extra=SCHEDULE,
    )
    mains_only: bool = Field(
        False, description="Train on mains power only, not on battery.", json_schema_extra=SCHEDULE
    )
    max_load: Fraction | None = Field(
        None,
        description="Share of the processors that other processes may use while the device trains. Default: no limit.",
        json_schema_extra=SCHEDULE,
    )
    on_metered: bool = Field(
        True, description="Train and send updates on a metered network too.", json_schema_extra=SCHEDULE
    )

    watch: File | None = Field(
        None, description="Folder whose new files are classified with the newest model.", json_schema_extra=OUTPUT
    )
    frigate: FrigateTopic | None = Field(
        None,
        description="Topic of a state classification of Frigate, where the class of each new file of --watch is "
        "published too: PREFIX/CAMERA/classification/MODEL. Default: none.",
        json_schema_extra=OUTPUT,
    )
    metrics: MetricsAddress | None = Field(
        None, description="HOST:PORT to serve Prometheus metrics on. Default: none.", json_schema_extra=OUTPUT
    )
    page: PageAddress | None = Field(
        None,
        description="HOST:PORT of the device's page, where people see its state and label the files of --watch. "
        "Default: none.",
        json_schema_extra=OUTPUT,
    )

    @model_validator(mode="after")
    def _check_frigate(self) -> Settings:
        if self.frigate is not None and self.watch is None:
            raise ValueError("--frigate publishes the classes of the files of --watch; give --watch DIR, or omit it")
        return self

    @property
    def thread_count(self) -> int:
        """`threads`, or one per processor that this process may use."""
        return self.threads or usable_processors()

    @property
    def limits(self) -> Limits:
        return Limits(self.hours, self.max_temperature, self.mains_only, self.max_load, self.on_metered)
