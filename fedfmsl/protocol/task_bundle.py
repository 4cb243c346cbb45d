"""A bundle with the task that it is used for. What depends on the classes follows from both: the layout of an expert's
trainables and their initial values."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fedfmsl.algorithms.arrays import Vector
from fedfmsl.errors import BundleError
from fedfmsl.protocol.bundle import Bundle
from fedfmsl.protocol.layout import expert_layout
from fedfmsl.protocol.task import TASK, Task


class TaskBundle(Bundle):
    """`expert` is the layout of an expert's trainables: the head (C, F), then the LoRA."""

    def __init__(self, bundle: Bundle, task: Task, where: str = "the task") -> None:
        """`where`: the task's file, for errors.

        Raises BundleError if the task belongs to another bundle, or has a head that does not fit.
        """
        super().__init__(bundle.root, bundle.manifest, bundle.sha256)
        task.check_bundle(bundle.sha256, where)
        feature = bundle.manifest.dims.feature
        if task.zero_shot is not None and task.zero_shot.rows.shape[1] != feature:
            rows = list(task.zero_shot.rows.shape)
            raise BundleError(f"{where} has a zero-shot head {rows}, expected {feature} columns; make the task again")
        self.task = task
        self.expert = expert_layout(len(task.classes), feature, self.lora)

    @classmethod
    def load(cls, root: str | Path, task: Path | None = None) -> TaskBundle:
        """The bundle in a folder, with the task in a file. Default: the one beside the bundle's files.

        Raises BundleError if one of them cannot be used, or if they do not belong together.
        """
        bundle = Bundle.load(root)
        path = task or bundle.root / TASK
        if task is None and not path.is_file():
            raise BundleError(f"bundle {bundle.root} has no {TASK}; name the classes with --classes, or pass --task")
        return cls(bundle, Task.read(path), f"task {path}")

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the C classes, by index."""
        return self.task.classes

    @property
    def tuned_parameters(self) -> int:
        """Trainable parameters of the highest level."""
        return self.expert.total

    @property
    def tuned_share(self) -> float:
        """Trainable parameters of the highest level, as a share of the backbone's parameters."""
        return self.tuned_parameters / self.manifest.backbone_parameters

    def initial(self) -> tuple[Vector, Vector]:
        """The trainables that every run starts from: expert at the highest level (P,) with a head of zeros, gate
        adapter (G,)."""
        lora, gate = self.initial_lora_and_gate()
        return np.concatenate([np.zeros(self.expert.size(0), np.float32), lora]), gate


def with_numbered_classes(bundle: Bundle, classes: int) -> TaskBundle:
    """The bundle with this number of classes, class-0 and so on, for measurements."""
    return TaskBundle(bundle, Task(bundle.sha256, tuple(f"class-{index}" for index in range(classes))))
