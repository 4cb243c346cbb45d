"""The settings that name the task of a run: what the devices are to tell apart."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from fedfmsl.common.settings import File, SettingsModel
from fedfmsl.protocol.bundle import Bundle
from fedfmsl.protocol.class_names import read_names
from fedfmsl.protocol.setting_types import ClassList
from fedfmsl.protocol.task import TASK, Task
from fedfmsl.protocol.task_bundle import TaskBundle
from trainer_server.config import RUN


class TaskSettings(SettingsModel):
    """The task of a run over a bundle."""

    classes: ClassList = Field(
        (),
        description="Names of the classes, separated by commas. Quote a name with a comma: '\"a, b\",c'. Default: the "
        f"bundle's {TASK}, which export.build --classes and export.task write.",
        json_schema_extra=RUN,
    )
    classes_file: File | None = Field(
        None, description="Take the class names from this text file, one per line.", json_schema_extra=RUN
    )
    task: File | None = Field(
        None, description="Task file of export.task: class names, with a zero-shot head.", json_schema_extra=RUN
    )

    @model_validator(mode="after")
    def _one_source(self) -> TaskSettings:
        given = {"--classes": bool(self.classes), "--classes-file": self.classes_file, "--task": self.task}
        named = [flag for flag, value in given.items() if value]
        if len(named) > 1:
            raise ValueError(f"{' and '.join(named)} exclude each other; omit {'one' if len(named) == 2 else 'two'}")
        return self

    def open_task(self, bundle: Path) -> TaskBundle:
        """The bundle in a folder with the task of these settings.

        Raises BundleError if one of them cannot be used, InputError if the file of names cannot be read, ConfigError
        for invalid names.
        """
        if self.classes_file is not None:
            names, source = read_names(self.classes_file, "--classes-file"), f"--classes-file {self.classes_file}"
        else:
            names, source = list(self.classes), "--classes"
        if not names and self.classes_file is None:
            return TaskBundle.load(bundle, self.task)
        opened = Bundle.load(bundle)
        return TaskBundle(opened, Task.of(opened.sha256, names, source))
