"""The features of samples: the hidden state of each below the active blocks, computed once and kept on disk (ours).

While a SAL level lasts everything below its suffix is constant, so a step starts from the cached state. A state is
stored, as a rule in fp16, in a file named after the sample's content, in a folder whose name is a hash of all it
depends on: frozen weights, graph, preprocessing, level, and the LoRA applied on the way. It can be missing, but never
stale. One that the disk has no room for is computed each time it is needed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.data.cache import DiskCache, Worth
from edge_runtime.data.inputs import reader_of
from edge_runtime.data.samples import Sample, SampleChangedError
from edge_runtime.engines.memory import release_free_memory
from edge_runtime.engines.sessions import open_session, run
from fedfmsl.algorithms.arrays import Floats, Vector
from fedfmsl.errors import InputError
from fedfmsl.protocol.bundle import Bundle, file_sha256

BATCH = 4  # larger ones are no faster, and take memory
LIFTED_AT_ONCE = 16  # samples between which a lift's graphs are opened again: only one is, at any time
POOLED = "pooled"
Report = Callable[[str, int, int], None]  # activity, done, total
Computed = Iterator[tuple[Sequence[Sample], Floats]]  # some samples and their states (B, N, D), one after the other


@dataclass(frozen=True)
class HiddenStates:
    """The states of some samples, read (or, if need be, computed) as they are needed."""

    folder: str
    samples: Sequence[Sample]
    batch_size: int
    read: Callable[[Sequence[Sample]], Floats]

    def __len__(self) -> int:
        return len(self.samples)

    def batch(self, indices: Sequence[int] | NDArray[np.int64] | range) -> Floats:
        """(B, N, D) of the samples at `indices`."""
        return self.read([self.samples[index] for index in indices])

    def batches(self) -> Iterator[Floats]:
        for start in range(0, len(self), self.batch_size):
            yield self.read(self.samples[start : start + self.batch_size])


class FeatureCache:
    """Hidden states at any level, with or without LoRA below it, and the frozen backbone's pooled features."""

    def __init__(
        self,
        disk: DiskCache,
        bundle: Bundle,
        threads: int,
        report: Report = lambda *_: None,
        batch_size: int = BATCH,
        make_room: Callable[[], None] = lambda: None,
        dtype: type[np.floating[Any]] = np.float16,
    ) -> None:
        """`batch_size` samples go through the backbone at once; `make_room` frees memory before they do."""
        self._disk = disk
        self._bundle = bundle
        self._threads = threads
        self._report = report
        self._batch_size = batch_size
        self._make_room = make_room
        self._dtype = np.dtype(dtype)
        dims = bundle.manifest.dims
        self._shape = (dims.tokens, dims.hidden)
        self._feature = dims.feature

    def precise(self) -> FeatureCache:
        """The same with states in fp32, for what is computed only once."""
        return FeatureCache(
            self._disk, self._bundle, self._threads, self._report, self._batch_size, self._make_room, np.float32
        )

    def frozen(self, samples: Sequence[Sample], level: int) -> HiddenStates:
        """Below the suffix of `level`, nothing but frozen weights underneath.

        One pass over missing samples also stores the state of the next level and the pooled feature, so that a level
        change finds its features waiting.
        """
        folder = self._folders(level)[f"hidden_{level}"]
        for _ in self._extract(self._to_store(folder, samples), level):
            pass
        return self._states(folder, samples, partial(self._frozen, level=level))

    def lifted(self, samples: Sequence[Sample], from_level: int, to_level: int, theta: Vector) -> HiddenStates:
        """Below the suffix of `to_level`, with `theta`'s LoRA in the blocks between it and `from_level`."""
        if from_level <= to_level:
            return self.frozen(samples, to_level)
        blocks = self._bundle.manifest.dims.blocks
        parts = self._bundle.expert.parts
        loras = {block: theta[parts[str(block)]] for block in range(blocks - from_level, blocks - to_level)}
        digest = hashlib.sha256(b"".join(lora.tobytes() for lora in loras.values())).hexdigest()[:16]
        folder = self._folder(f"level-{to_level}-above-{from_level}-{digest}", Worth.DERIVED)
        lift = partial(self._lift, from_level=from_level, loras=loras)
        missing, done = self._to_store(folder, samples), 0
        for part, states in lift(missing):
            self._store(folder, part, states)
            done += len(part)
            self._report("features", done, len(missing))
        return self._states(folder, samples, lift)

    def pooled(self, samples: Sequence[Sample], level: int) -> Floats:
        """The frozen backbone's pooled features (n, F). A pass over missing samples stores what `frozen` would."""
        folder = self._folder(POOLED, Worth.SMALL)
        rows = {sample.sha256: self._disk.get(folder, sample.sha256) for sample in samples}
        for part, features in self._extract([s for s in samples if rows[s.sha256] is None], level):
            rows.update((sample.sha256, row.tobytes()) for sample, row in zip(part, features, strict=True))
        data = b"".join(rows[sample.sha256] or b"" for sample in samples)
        return np.frombuffer(data, np.float32).reshape(-1, self._feature)

    def drop_unused(self) -> None:
        """Deletes every state that nobody asked for since the last call; pooled features are small and stay."""
        self._folder(POOLED, Worth.SMALL)
        self._disk.drop_unused()

    @property
    def used(self) -> int:
        """Bytes of disk."""
        return self._disk.used

    def keep_free(self) -> None:
        """Deletes as much as is missing from what the disk has to keep free."""
        self._disk.keep_free()

    def drop_others(self, samples: Iterable[Sample]) -> None:
        """Deletes every state and feature of other samples than these: they have left."""
        self._disk.drop_others({sample.sha256 for sample in samples})

    def evict_all(self) -> None:
        """Deletes everything: it can be computed again, and somebody else needs the disk."""
        self._disk.evict_all()

    def _folder(self, name: str, worth: Worth) -> str:
        folder = f"{self._bundle.features_key}-{self._dtype.name}-{name}"
        self._disk.ask_for(folder, worth)
        return folder

    def _folders(self, level: int) -> dict[str, str]:
        """Where the outputs of a pass are kept: the frozen states of a level, and of the next, and the features."""
        ahead = min(level + 1, self._bundle.manifest.levels)
        return {
            f"hidden_{ahead}": self._folder(f"level-{ahead}", Worth.AHEAD),
            f"hidden_{level}": self._folder(f"level-{level}", Worth.PRESENT),
            POOLED: self._folder(POOLED, Worth.SMALL),
        }

    def _to_store(self, folder: str, samples: Sequence[Sample]) -> list[Sample]:
        """Those that are missing, as many as there is room for."""
        missing = [sample for sample in samples if not self._disk.has(folder, sample.sha256)]
        return missing[: self._disk.room(folder, self._dtype.itemsize * self._shape[0] * self._shape[1])]

    def _states(
        self, folder: str, samples: Sequence[Sample], compute: Callable[[Sequence[Sample]], Computed]
    ) -> HiddenStates:
        return HiddenStates(folder, samples, self._batch_size, partial(self._read, folder, compute))

    def _read(self, folder: str, compute: Callable[[Sequence[Sample]], Computed], samples: Sequence[Sample]) -> Floats:
        states = np.empty((len(samples), *self._shape), np.float32)
        missing = []
        for row, sample in enumerate(samples):
            data = self._disk.get(folder, sample.sha256)
            if data is None:
                missing.append(row)
            else:
                states[row] = np.frombuffer(data, self._dtype).reshape(self._shape)
        for part, found in compute([samples[row] for row in missing]):
            self._store(folder, part, found)
            rows, missing = missing[: len(part)], missing[len(part) :]
            states[rows] = found.astype(self._dtype)  # what it would be if it came from the disk
        return states

    def _store(self, folder: str, samples: Sequence[Sample], rows: Floats) -> None:
        dtype = self._dtype if rows.ndim == 3 else rows.dtype  # pooled features are kept as they are
        for sample, row in zip(samples, rows, strict=True):
            self._disk.put(folder, sample.sha256, row.astype(dtype).tobytes())

    def _extract(self, samples: Sequence[Sample], level: int) -> Computed:
        """Passes that store all they find; yields samples and their pooled features (B, F)."""
        folders, done = self._folders(level), 0
        for part, found in self._passes(samples, list(folders)):
            for folder, rows in zip(folders.values(), found, strict=True):
                self._store(folder, part, rows)
            done += len(part)
            self._report("features", done, len(samples))
            yield part, found[-1]

    def _frozen(self, samples: Sequence[Sample], level: int) -> Computed:
        return ((part, states) for part, (states,) in self._passes(samples, [f"hidden_{level}"]))

    def _passes(self, samples: Sequence[Sample], outputs: list[str]) -> Iterator[tuple[Sequence[Sample], list[Floats]]]:
        """Raises SampleChangedError if a sample is not what it was when its folder was looked at."""
        if not samples:
            return
        reader = reader_of(self._bundle)
        self._make_room()
        session = open_session(self._bundle, "features.onnx", self._threads)
        for start in range(0, len(samples), self._batch_size):
            part = samples[start : start + self._batch_size]
            _check_unchanged(part)
            try:
                batch = reader.batch([sample.path for sample in part])
            except InputError:
                _check_unchanged(part)
                raise
            yield part, run(session, outputs, batch)
        del session
        release_free_memory()

    def _lift(self, samples: Sequence[Sample], from_level: int, loras: Mapping[int, Vector]) -> Computed:
        states = self.frozen(samples, from_level)
        for start in range(0, len(samples), LIFTED_AT_ONCE):
            part = samples[start : start + LIFTED_AT_ONCE]
            hidden = states.read(part)
            self._make_room()
            for block, lora in loras.items():
                session = open_session(self._bundle, f"lift-{block}.onnx", self._threads)
                for some in range(0, len(part), self._batch_size):
                    now = slice(some, some + self._batch_size)
                    (hidden[now],) = run(session, ["lifted"], {"hidden": hidden[now], "theta": lora})
                del session
            release_free_memory()
            yield part, hidden


def _check_unchanged(samples: Sequence[Sample]) -> None:
    for sample in samples:
        try:
            unchanged = file_sha256(sample.path) == sample.sha256
        except OSError:  # it has gone, perhaps with its whole disk
            unchanged = False
        if not unchanged:
            raise SampleChangedError(sample.path)
