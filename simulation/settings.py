"""The settings of a simulation. See `fedfmsl.common.settings` for flags, variables and the TOML file."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from devices.trial.settings import TrialSettings
from fedfmsl.common.settings import MAX_THREADS, CommaSeparated, File, Fraction, flag_of, panel
from fedfmsl.transport.settings import RunName
from simulation.methods import METHODS
from simulation.partition import Scheme
from trainer_server.config import STAGE1
from trainer_server.defaults import MAX_DEVICES, MAX_ROUNDS
from trainer_server.task_settings import TaskSettings

DATA = panel("Data")
RUN = panel("Run")
GRID = panel("Grid: a cell for each combination")
DEVICES = panel("Devices")
PROCESSES = panel("Processes")
Share = Annotated[float, Field(ge=0, lt=1)]
Alpha = Annotated[float, Field(ge=1e-3)]
Rate = Annotated[float, Field(gt=0)]
LevelCap = Annotated[int, Field(ge=1)]


class SimulationSettings(TaskSettings):
    """What the command `simulate` needs."""

    bundle: File = Field(description="Bundle folder, as export.build writes it.", json_schema_extra=RUN)
    name: RunName = Field(
        "simulation", description="Name of the simulation; results are in runs/NAME.", json_schema_extra=RUN
    )
    rounds: int = Field(
        17, ge=1, le=MAX_ROUNDS, description="Communication rounds, of both stages together.", json_schema_extra=RUN
    )
    epochs: int = Field(STAGE1.epochs, ge=1, description="Local epochs in a round.", json_schema_extra=RUN)
    batch_size: int = Field(STAGE1.batch_size, ge=1, description="Samples in one training step.", json_schema_extra=RUN)
    max_level: int | None = Field(
        None, ge=1, description="Highest level. Default: the bundle's.", json_schema_extra=RUN
    )
    test_devices: int = Field(
        20,
        ge=1,
        description="Number of devices that are measured on the test samples of the whole fleet. All are measured on "
        "their own.",
        json_schema_extra=RUN,
    )

    methods: Annotated[tuple[str, ...], CommaSeparated] = Field(
        ("fedfmsl",), description=f"Methods: {', '.join(METHODS)}.", json_schema_extra=GRID
    )
    seeds: int = Field(1, ge=1, le=1000, description="Seeds 0 … n-1.", json_schema_extra=GRID)
    alpha: Annotated[tuple[Alpha, ...], CommaSeparated] = Field(
        (0.5,), description="Dirichlet α of --partition dirichlet and quantity.", json_schema_extra=GRID
    )
    learning_rate: Annotated[tuple[Rate, ...], CommaSeparated] = Field(
        (STAGE1.learning_rate,), description="Learning rate of AdamW on the devices.", json_schema_extra=GRID
    )

    images: File | None = Field(
        None,
        description="Folder of images or texts: DIR/<class>/… or DIR/{train,test}/<class>/…; with --partition natural, "
        "DIR/<group>/ holds one of these for each group.",
        json_schema_extra=DATA,
    )
    dataset: str | None = Field(
        None,
        description="Parquet file, folder of parquet files, saved Hugging Face dataset, or id of one on its hub.",
        json_schema_extra=DATA,
    )
    sample_column: str = Field(
        "", description="Column of images or texts. Default: the first that fits.", json_schema_extra=DATA
    )
    label_column: str = Field(
        "", description="Column of classes. Default: label, labels, class or category.", json_schema_extra=DATA
    )
    group_column: str = Field("", description="Column of groups, for --partition natural.", json_schema_extra=DATA)
    partition: Scheme = Field(
        Scheme.DIRICHLET, description="How samples are divided among devices.", json_schema_extra=DATA
    )
    classes_per_device: int = Field(
        2, ge=1, description="Classes of a device with --partition pathological.", json_schema_extra=DATA
    )
    min_samples: int = Field(2, ge=2, description="Training samples that each device needs.", json_schema_extra=DATA)

    devices: int = Field(
        TrialSettings.model_fields["devices"].default,
        ge=1,
        le=MAX_DEVICES,
        description="Number of devices in the federation.",
        json_schema_extra=DEVICES,
    )
    unseen: int = Field(
        0,
        ge=0,
        le=MAX_DEVICES,
        description="Number of further devices that are kept out of it, for evaluation.",
        json_schema_extra=DEVICES,
    )
    fraction: Fraction = Field(
        1.0, description="Share of devices selected in a round of training, rounded up.", json_schema_extra=DEVICES
    )
    dropout: Share = Field(
        0.0, description="Probability that a selected device does not answer.", json_schema_extra=DEVICES
    )
    stragglers: Share = Field(
        0.0,
        description="Share of the answers that miss the round deadline: those of slow devices and of large ones.",
        json_schema_extra=DEVICES,
    )
    level_caps: Annotated[tuple[LevelCap, ...], CommaSeparated] = Field(
        (),
        description="Level caps, each of equally many devices; for fedfmsl and its ablations. Default: no caps.",
        json_schema_extra=DEVICES,
    )

    threads: int = Field(
        0,
        ge=0,
        le=MAX_THREADS,
        description="Threads; 0: one per core. With --ray, of each worker process; 0: one.",
        json_schema_extra=PROCESSES,
    )
    ray: bool = Field(
        False,
        description="Compute in several processes on Ray: cells and devices in parallel.",
        json_schema_extra=PROCESSES,
    )
    address: str | None = Field(
        None, description="Address of a Ray cluster, or auto. Default: this machine.", json_schema_extra=PROCESSES
    )

    @model_validator(mode="after")
    def _check(self) -> SimulationSettings:
        if (self.images is None) == (self.dataset is None):
            raise ValueError("give --images DIR or --dataset NAME, and not both")
        unknown = [name for name in self.methods if name not in METHODS]
        if unknown:
            raise ValueError(f"--methods {unknown[0]!r}: no such method; choose from {', '.join(METHODS)}")
        if not (self.methods and self.alpha and self.learning_rate):
            raise ValueError("--methods, --alpha and --learning-rate need at least one value each")
        for name, (needed, has_effect) in self._needs().items():
            if name in self.model_fields_set and not has_effect:
                raise ValueError(f"{flag_of(name)} has no effect without {needed}; leave it out, or give {needed}")
        return self

    def _needs(self) -> dict[str, tuple[str, bool]]:
        """For options that need another one: which, and whether it is given."""
        dataset = ("--dataset", self.dataset is not None)
        dirichlet = self.partition in (Scheme.DIRICHLET, Scheme.QUANTITY)
        return {
            "sample_column": dataset,
            "label_column": dataset,
            "group_column": ("--dataset and --partition natural", dataset[1] and self.partition is Scheme.NATURAL),
            "classes_per_device": ("--partition pathological", self.partition is Scheme.PATHOLOGICAL),
            "alpha": ("--partition dirichlet or quantity", dirichlet),
        }
