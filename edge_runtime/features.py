"""The feature cache: the hidden state of each image below the active blocks, computed once and kept on disk (ours).

While a SAL level lasts everything below its suffix is constant, so a step starts from the cached state. A state is
stored, as a rule in fp16, in a file named after the image's content, in a folder whose name is a hash of all it depends
on: frozen weights, graph, preprocessing, level, and the LoRA applied on the way. It can be missing, but never stale.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.engine import Floats, open_session, run
from edge_runtime.inputs import reader_of
from edge_runtime.memory import release_free_memory
from edge_runtime.samples import Sample
from protocol.bundle import Bundle
from protocol.layout import Vector
from shell.files import write_atomically

BATCH = 4  # larger ones are no faster, and take memory
Report = Callable[[str, int, int], None]  # activity, done, total


@dataclass(frozen=True)
class HiddenStates:
    """The cached states of some images, read as they are needed. `len()` images; `batch()` gives (B, N, D)."""

    folder: Path
    images: Sequence[Sample]
    shape: tuple[int, int]
    dtype: np.dtype[Any]

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Sequence[int] | NDArray[np.int64] | range) -> Floats:
        states = np.empty((len(indices), *self.shape), self.dtype)
        for row, index in enumerate(indices):
            data = (self.folder / self.images[index].sha256).read_bytes()
            states[row] = np.frombuffer(data, self.dtype).reshape(self.shape)
        return states.astype(np.float32, copy=False)

    def batches(self) -> Iterator[Floats]:
        for start in range(0, len(self), BATCH):
            yield self.batch(range(start, min(start + BATCH, len(self))))


class FeatureCache:
    """Hidden states at any level, with or without LoRA below it, and the frozen backbone's pooled features."""

    def __init__(
        self,
        root: Path,
        bundle: Bundle,
        threads: int,
        report: Report = lambda *_: None,
        dtype: type[np.floating[Any]] = np.float16,
    ) -> None:
        self._dtype = np.dtype(dtype)
        self._root = root
        self._bundle = bundle
        self._threads = threads
        self._report = report
        dims = bundle.manifest.dims
        self._shape = (dims.tokens, dims.hidden)
        self._feature = dims.feature
        self._used: set[str] = set()

    def precise(self) -> FeatureCache:
        """The same with states in fp32, for what is computed only once."""
        return FeatureCache(self._root, self._bundle, self._threads, self._report, np.float32)

    def frozen(self, images: Sequence[Sample], level: int) -> HiddenStates:
        """Below the suffix of `level`, nothing but frozen weights underneath.

        One pass over missing images also stores the state of the next level and the pooled feature, so that a level
        change finds its features waiting.
        """
        folder = self._folders_of(level)[level]
        missing = self._missing(folder, images)
        if missing:
            self._extract(missing, level)
        return HiddenStates(folder, images, self._shape, self._dtype)

    def lifted(self, images: Sequence[Sample], from_level: int, to_level: int, theta: Vector) -> HiddenStates:
        """Below the suffix of `to_level`, with `theta`'s LoRA in the blocks between it and `from_level`."""
        if from_level <= to_level:
            return self.frozen(images, to_level)
        manifest = self._bundle.manifest
        blocks = range(manifest.dims.blocks - from_level, manifest.dims.blocks - to_level)
        loras = {block: theta[self._bundle.expert.parts[str(block)]] for block in blocks}
        digest = hashlib.sha256(b"".join(lora.tobytes() for lora in loras.values())).hexdigest()[:16]
        folder = self._folder(f"level-{to_level}-above-{from_level}-{digest}")
        missing = self._missing(folder, images)
        if missing:
            states = self.frozen(missing, from_level)
            sessions = {block: open_session(self._bundle, f"lift-{block}.onnx", self._threads) for block in blocks}
            done = 0
            for hidden in states.batches():
                for block, session in sessions.items():
                    (hidden,) = run(session, ["lifted"], {"hidden": hidden, "theta": loras[block]})
                self._store(folder, missing[done : done + len(hidden)], hidden)
                done += len(hidden)
                self._report("features", done, len(missing))
            del sessions, session
            release_free_memory()
        return HiddenStates(folder, images, self._shape, self._dtype)

    def pooled(self, images: Sequence[Sample], level: int) -> Floats:
        """The frozen backbone's pooled features (n, F). A pass over missing images stores what `frozen` would."""
        folder = self._folder("pooled")
        missing = [image for image in images if not self._is_stored(folder, image, self._feature * 4)]
        if missing:
            self._extract(missing, level)
        rows = [np.frombuffer((folder / image.sha256).read_bytes(), np.float32) for image in images]
        return np.stack(rows) if rows else np.empty((0, self._feature), np.float32)

    def drop_unused(self) -> None:
        """Deletes every state that nobody asked for since the last call; pooled features are small and stay."""
        keep = {path.name for path in map(self._folder, [*self._used, "pooled"])}
        if self._root.is_dir():
            for folder in self._root.iterdir():
                if folder.name not in keep:
                    shutil.rmtree(folder, ignore_errors=True)
        self._used = set()

    def _folder(self, name: str) -> Path:
        self._used.add(name)
        return self._root / f"{self._bundle.features_key}-{self._dtype.name}-{name}"

    def _missing(self, folder: Path, images: Collection[Sample]) -> list[Sample]:
        size = self._shape[0] * self._shape[1] * self._dtype.itemsize
        return [image for image in images if not self._is_stored(folder, image, size)]

    @staticmethod
    def _is_stored(folder: Path, image: Sample, size: int) -> bool:
        try:
            return (folder / image.sha256).stat().st_size == size
        except OSError:
            return False

    def _folders_of(self, level: int) -> dict[int, Path]:
        """Where the frozen states of a level, and of the next, are kept."""
        ahead = min(level + 1, self._bundle.manifest.levels)
        return {wanted: self._folder(f"level-{wanted}") for wanted in (level, ahead)}

    def _extract(self, images: Sequence[Sample], level: int) -> None:
        folders = self._folders_of(level)
        pooled = self._folder("pooled")
        reader = reader_of(self._bundle)
        session = open_session(self._bundle, "features.onnx", self._threads)
        outputs = [f"hidden_{level}" for level in folders]
        for start in range(0, len(images), BATCH):
            part = images[start : start + BATCH]
            *states, features = run(session, [*outputs, "pooled"], reader.batch([image.path for image in part]))
            for folder, hidden in zip(folders.values(), states, strict=True):
                self._store(folder, part, hidden)
            for image, feature in zip(part, features, strict=True):
                write_atomically(pooled / image.sha256, feature.tobytes())
            self._report("features", start + len(part), len(images))
        del session
        release_free_memory()

    def _store(self, folder: Path, images: Sequence[Sample], hidden: Floats) -> None:
        for image, state in zip(images, hidden.astype(self._dtype), strict=True):
            write_atomically(folder / image.sha256, state.tobytes())
