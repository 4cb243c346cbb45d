"""Reads each new file once (ours), for its SHA-256 and its decoded input. The input stays in memory until its features
are computed.

The memory for decoded inputs is bounded. Photos that arrive one by one fit, and are opened once. A device's first scan
may find thousands, and features are computed only after the memory plan is made. Inputs that do not fit until then are
read a second time.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.data.inputs import Kind, Reader
from edge_runtime.data.samples import Sample, SampleChangedError
from edge_runtime.data.unreadable import UnreadableError, check_name, check_size, read_file
from fedfmsl.common.class_folders import ClassFile
from fedfmsl.common.folder_walk import FileVersion

KEPT_BYTES = 2**23  # of decoded inputs: 55 images of 224 × 224 pixels, or thousands of texts


class SampleReader:
    """One per process. The scan of the folder adds decoded inputs, the feature cache removes them."""

    def __init__(self, reader: Reader, kept_bytes: int = KEPT_BYTES) -> None:
        self._reader = reader
        self._kept_bytes = kept_bytes
        self._inputs: dict[str, NDArray[Any]] = {}  # by SHA-256, oldest first
        self._used = 0  # bytes

    @property
    def kind(self) -> Kind:
        return self._reader.kind

    def read(self, file: ClassFile, label: int, largest: int) -> Sample | None:
        """The sample in a file; without `sha256` if its extent is more than `largest`.

        None: the file has changed since it was listed. Raises OSError if it cannot be opened or read, UnreadableError
        if it cannot be decoded.
        """
        size = file.version.size
        check_name(file.name)
        check_size(size)
        with file.path.open("rb") as opened:
            if FileVersion.of(os.fstat(opened.fileno())) != file.version:
                return None
            extent = self._reader.extent(opened, size)
            if extent > largest:
                return Sample(file.path, "", label, extent)
            opened.seek(0)
            data = opened.read(size + 1)
            if len(data) != size or FileVersion.of(os.fstat(opened.fileno())) != file.version:
                return None
        value = self._reader.decode(data)
        sample = Sample(file.path, hashlib.sha256(data).hexdigest(), label, extent)
        self._keep(sample.sha256, value)
        return sample

    def batch(self, samples: Sequence[Sample]) -> dict[str, NDArray[Any]]:
        """`pixels` (B, S, S, 3) uint8 or `tokens` (B, N) int64.

        Raises SampleChangedError if a file that has to be read has changed, or can no longer be decoded.
        """
        return {self._reader.input: np.stack([self._input(sample) for sample in samples])}

    def _input(self, sample: Sample) -> NDArray[Any]:
        kept = self._take(sample.sha256)
        if kept is not None:
            return kept
        try:
            data = read_file(sample.path)
            if hashlib.sha256(data).hexdigest() != sample.sha256:
                raise SampleChangedError(sample.path)
            return self._reader.decode(data)
        except UnreadableError as error:  # deleted, or its disk was removed, or memory is short now
            raise SampleChangedError(sample.path) from error

    def _keep(self, sha256: str, value: NDArray[Any]) -> None:
        if sha256 not in self._inputs:
            self._inputs[sha256] = value
            self._used += value.nbytes
        while self._used > self._kept_bytes:
            self._take(next(iter(self._inputs)))

    def _take(self, sha256: str) -> NDArray[Any] | None:
        value = self._inputs.pop(sha256, None)
        self._used -= 0 if value is None else value.nbytes
        return value
