"""The settings of a trial. See `fedfmsl.common.settings` for flags, variables and the TOML file."""

from __future__ import annotations

from pydantic import ByteSize, Field, model_validator

from fedfmsl.common.settings import File, panel
from fedfmsl.protocol.setting_types import ClassList, EngineChoice, Precision
from fedfmsl.transport.settings import CONNECTION, AccessSettings, Broker, RunName
from trainer_server.defaults import MAX_ROUNDS, STAGE1_ROUNDS, STAGE2_ROUNDS

DATA = panel("Data")
MODEL = panel("Model")
RUN = panel("Run")
MAX_TRIAL = 1000  # devices, each of which is a process


class TrialSettings(AccessSettings):
    """What the command `devices.trial` needs."""

    name: RunName = Field("trial", description="Name of the run; results are in runs/NAME.", json_schema_extra=RUN)
    devices: int = Field(6, ge=1, le=MAX_TRIAL, description="Number of devices.", json_schema_extra=RUN)
    seed: int = Field(0, ge=0, description="Seed of the shares, the export and the run.", json_schema_extra=RUN)
    stage1_rounds: int = Field(
        STAGE1_ROUNDS, ge=1, le=MAX_ROUNDS, description="Rounds of stage 1.", json_schema_extra=RUN
    )
    stage2_rounds: int = Field(
        STAGE2_ROUNDS, ge=1, le=MAX_ROUNDS, description="Rounds of stage 2.", json_schema_extra=RUN
    )
    round_timeout: float = Field(300.0, ge=1, description="Seconds until the round deadline.", json_schema_extra=RUN)
    baseline: bool = Field(True, description="Also train every device alone, for comparison.", json_schema_extra=RUN)
    unseen: int = Field(
        0,
        ge=0,
        le=MAX_TRIAL,
        description="Number of further devices that get a share of the samples and do not take part. The models are "
        "tested on them.",
        json_schema_extra=RUN,
    )
    memory: ByteSize | None = Field(
        None,
        gt=0,
        description="Memory limit of each device, like 512MB. Default: half of the machine's memory.",
        json_schema_extra=RUN,
    )
    broker: Broker | None = Field(
        None, description="Address of the MQTT broker. Default: an embedded broker.", json_schema_extra=CONNECTION
    )

    images: File | None = Field(
        None,
        description="Folder of images or texts: DIR/<class>/… or DIR/{train,test}/<class>/… Default: photos of "
        "groceries, downloaded once.",
        json_schema_extra=DATA,
    )
    classes_from_folders: bool = Field(
        False,
        description="Use every class folder of --images (the default; see --classes).",
        json_schema_extra=DATA,
    )
    classes: ClassList = Field(
        (),
        description="Use only these classes of --images, separated by commas. Quote a name with a comma.",
        json_schema_extra=DATA,
    )
    alpha: float = Field(
        0.5,
        ge=1e-3,
        description="Dirichlet α of the devices' shares of each class. A smaller α makes them less equal.",
        json_schema_extra=DATA,
    )

    model: str | None = Field(
        None, description="As for export.build. Default: DINOv2 ViT-S/14, downloaded once.", json_schema_extra=MODEL
    )
    weights: str | None = Field(None, description="As for export.build; requires --model.", json_schema_extra=MODEL)
    image_size: int | None = Field(
        None, ge=1, description="Pixels per side. Default: 140, or that of --model.", json_schema_extra=MODEL
    )
    precision: Precision | None = Field(
        None,
        description="As for export.build. Default: int8 for the default model, where it is as accurate and twice as "
        "fast; else, and with --engine ort-training, fp32.",
        json_schema_extra=MODEL,
    )
    levels: int = Field(3, ge=1, description="Highest SAL level.", json_schema_extra=MODEL)
    engine: EngineChoice = Field(
        "auto",
        description="Engine of the devices. With ort-training, the export also writes its artifacts.",
        json_schema_extra=MODEL,
    )

    @model_validator(mode="after")
    def _check_combinations(self) -> TrialSettings:
        if self.classes and self.classes_from_folders:
            raise ValueError("--classes and --classes-from-folders exclude each other; omit one of them")
        if (self.classes or self.classes_from_folders) and self.images is None:
            raise ValueError("--classes and --classes-from-folders require --images; add --images DIR")
        if self.weights and self.model is None:
            raise ValueError("--weights requires --model; add --model NAME")
        return self
