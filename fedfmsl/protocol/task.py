"""The task of a run: what a frozen backbone is to tell apart. A small file, named by its SHA-256, owned by the run.

A task belongs to one bundle, and one bundle serves any number of tasks. The index of a class is its place in the list.
The layout of an expert's trainables follows from bundle and task (`fedfmsl.protocol.task_bundle`), so each file with
such tensors names the task that it is for.

The file is a blob (see `fedfmsl.protocol.tensors`). Its tensors are the zero-shot head, if there is one. Without one, a
head starts from zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from fedfmsl.algorithms.arrays import Vector
from fedfmsl.errors import BundleError, ConfigError, MessageError, no_permission
from fedfmsl.protocol.class_names import MAX_BYTES, MAX_CLASSES, check_names
from fedfmsl.protocol.messages import Positive
from fedfmsl.protocol.tensors import blob_hash, pack, unpack

TASK = "task.safetensors"  # beside the bundle's files: the task of a run that is started without another one
MAX_TASK_HEADER_BYTES = 2 * MAX_CLASSES * (2 * MAX_BYTES + 8)  # each " and \ of a name is escaped twice
MAX_TASK_BYTES = 32 * 1024 * 1024
MAX_PROMPTS = 64
AGAIN = "make the task again, with --classes or python -m export.task"


class _Header(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    schema_version: Literal[1] = 1
    bundle: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    version: Positive = 1
    classes: tuple[str, ...]
    prompts: tuple[str, ...] = Field(default=(), max_length=MAX_PROMPTS)
    scale: float = Field(default=0.0, ge=0)


@dataclass(frozen=True)
class ZeroShot:
    """A head from class names alone: a unit vector per class, `rows` (C, F), and the model's `scale` of cosines.
    `prompts`: the templates that the names were written into, with '{}' for the name."""

    rows: Vector
    scale: float
    prompts: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Task:
    """`classes`: their names; the order is the index. `bundle`: the SHA-256 of the bundle that it belongs to.
    `version`: from 1; a run's later tasks have higher ones. Tasks are equal if their `sha256` is."""

    bundle: str
    classes: tuple[str, ...]
    zero_shot: ZeroShot | None = None
    version: int = 1

    @classmethod
    def of(cls, bundle: str, classes: Sequence[str], source: str, zero_shot: ZeroShot | None = None) -> Task:
        """The first task of a run, with the names in NFC. `source`: where they are from, for errors.

        Raises ConfigError as `check_names` does.
        """
        return cls(bundle, check_names(classes, source), zero_shot)

    def with_classes(self, added: Sequence[str]) -> Task:
        """The next version of the task, with further classes after the present ones. The zero-shot head has no row for
        them (zeros). Raises ConfigError as `check_names` does."""
        head = self.zero_shot
        if head is not None:
            rows = np.zeros((len(added), head.rows.shape[1]), np.float32)
            head = replace(head, rows=np.concatenate([head.rows, rows]))
        names = check_names([*self.classes, *added], "the task")
        return Task(self.bundle, names, head, self.version + 1)

    @cached_property
    def blob(self) -> bytes:
        """The file's bytes, the same for the same task."""
        head, tensors = self.zero_shot, {}
        if head is not None:
            tensors = {"zero_shot": np.asarray(head.rows, np.float32)}
        header = _Header(
            bundle=self.bundle,
            version=self.version,
            classes=self.classes,
            prompts=head.prompts if head else (),
            scale=head.scale if head else 0.0,
        )
        return pack(header, tensors)

    @cached_property
    def sha256(self) -> str:
        return blob_hash(self.blob)

    @classmethod
    def unpack(cls, blob: bytes) -> Task:
        """Raises MessageError if the blob is not a task, or if a name, a number or the head of it is not valid."""
        header, tensors = unpack(blob, _Header, MAX_TASK_HEADER_BYTES)
        try:
            names = check_names(header.classes, "the task")
        except ConfigError as error:
            raise MessageError(f"{error}") from None
        if names != header.classes:
            wrong = next(name for name, normal in zip(header.classes, names, strict=True) if name != normal)
            raise MessageError(f"the task: class {wrong!r} is not in Unicode's normal form NFC; {AGAIN}")
        if tensors.keys() - {"zero_shot"}:
            raise MessageError(f"the task has a tensor {min(tensors.keys() - {'zero_shot'})!r}, which no task has")
        return cls(header.bundle, names, _zero_shot(header, tensors.get("zero_shot")), header.version)

    @classmethod
    def read(cls, path: Path) -> Task:
        """The task in a file. Raises BundleError if there is none, or if it cannot be read."""
        try:
            size = path.stat().st_size
            if size > MAX_TASK_BYTES:
                raise BundleError(f"task {path} has {size} bytes, more than {MAX_TASK_BYTES}; {AGAIN}")
            return cls.unpack(path.read_bytes())
        except PermissionError as error:
            raise BundleError(no_permission(path)) from error
        except OSError as error:
            raise BundleError(f"no task at {path} ({error.strerror}); name the classes with --classes") from error
        except MessageError as error:
            raise BundleError(f"task {path} is not valid ({error}); {AGAIN}") from error

    def check_bundle(self, sha256: str, where: str) -> None:
        """Raises BundleError unless the task belongs to the bundle with this SHA-256. `where`: the task, for errors."""
        if self.bundle != sha256:
            raise BundleError(
                f"{where} belongs to another bundle (SHA-256 {self.bundle[:12]}…) than this one ({sha256[:12]}…); "
                f"pass its --bundle, or {AGAIN}"
            )


def _zero_shot(header: _Header, rows: np.ndarray | None) -> ZeroShot | None:
    if rows is None:
        return None
    if rows.dtype != np.float32 or rows.ndim != 2 or len(rows) != len(header.classes) or not np.isfinite(rows).all():
        expected = f"finite float32[{len(header.classes)}, F]"
        raise MessageError(f"the task's zero-shot head is {rows.dtype}{list(rows.shape)}, expected {expected}; {AGAIN}")
    return ZeroShot(rows, header.scale, header.prompts)
