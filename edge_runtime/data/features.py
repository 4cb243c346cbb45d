"""Hidden states and pooled features of samples, computed once and stored (ours).

While a SAL level lasts, the prefix is constant, so a step starts from the stored hidden state. A state is in fp16 by
default, and named after the sample's content. Its folder is named after everything else that the state depends on:
frozen weights, graph, preprocessing, decoding code, level, and the LoRA in the prefix. So a state can be missing, but
never stale. A state that the store has no space for is computed each time it is needed.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from edge_runtime.data import inputs
from edge_runtime.data.cache import DiskCache, Priority
from edge_runtime.data.inputs import reader_of
from edge_runtime.data.sample_reader import SampleReader
from edge_runtime.data.samples import Sample
from edge_runtime.engines.memory import release_free_memory
from edge_runtime.engines.sessions import CPU, open_session, run
from fedfmsl.algorithms.arrays import Floats, Vector
from fedfmsl.protocol.task_bundle import TaskBundle

BATCH = 4  # samples per pass; more are not faster and take more memory
# Levels above the present one whose states a pass also stores: as many as SAL can add in the 12 rounds of a usual stage
# 1. All 12 levels of ViT-B/16 are 3.6 MB per sample, and most runs never reach the highest ones. More levels ahead cost
# disk, fewer a pass through the backbone each time that SAL goes beyond them.
LEVELS_AHEAD = 4
LIFTED_AT_ONCE = 16  # samples that go through a lift graph before the next graph is opened
POOLED = "pooled"
NO_LEVEL = 0
Report = Callable[[str, int, int], None]  # activity, done, total
Computed = Iterator[tuple[Sequence[Sample], Floats]]  # batches of samples and their states (B, N, D)


@dataclass(frozen=True)
class HiddenStates:
    """The hidden states of samples, read from the cache or computed when they are needed."""

    folder: str
    samples: Sequence[Sample]
    batch_size: int
    read: Callable[[Sequence[Sample]], Floats]

    def __len__(self) -> int:
        return len(self.samples)

    def batch(self, indices: Sequence[int] | NDArray[np.int64] | range) -> Floats:
        """States of the samples at `indices`. Shape (B, N, D)."""
        return self.read([self.samples[index] for index in indices])

    def batches(self) -> Iterator[Floats]:
        for start in range(0, len(self), self.batch_size):
            yield self.read(self.samples[start : start + self.batch_size])


class Store(Protocol):
    """Named bytes in named folders. `DiskCache` has the same methods."""

    def use(self, folder: str, priority: Priority) -> None:
        """Marks a folder as used, before its names are read or written."""

    def has(self, folder: str, name: str) -> bool:
        """Whether the name was stored. Only `get` checks its bytes."""

    def get(self, folder: str, name: str) -> bytes | None:
        """The stored bytes, or None."""

    def put(self, folder: str, name: str, data: bytes) -> bool:
        """False if there is no space for the bytes."""

    def capacity(self, folder: str, length: int) -> int:
        """How many more names with `length` bytes fit in this folder."""


class Inputs(Protocol):
    """Decodes samples. `SampleReader` is one."""

    def batch(self, samples: Sequence[Sample]) -> dict[str, NDArray[Any]]:
        """`pixels` (B, S, S, 3) uint8 or `tokens` (B, N) int64.

        Raises SampleChangedError if a file that has to be read has changed.
        """


S_co = TypeVar("S_co", bound=Store, covariant=True)


class Features(Generic[S_co]):
    """Hidden states at any level, with or without LoRA in the prefix, and pooled features of the frozen backbone."""

    def __init__(
        self,
        store: S_co,
        bundle: TaskBundle,
        threads: int,
        report: Report = lambda *_: None,
        batch_size: int = BATCH,
        free_memory: Callable[[], None] = lambda: None,
        dtype: type[np.floating[Any]] = np.float16,
        reader: Inputs | None = None,
        provider: str = CPU,
        ahead: int = LEVELS_AHEAD,
    ) -> None:
        """`batch_size` samples go through the backbone at once. `free_memory` is called before a graph is opened.
        `reader` is shared with the scan of the folder; default: a new one. `provider`: the execution provider of ONNX
        Runtime. `ahead`: levels above the present one that are stored too. Raises ConfigError or BundleError as
        `reader_of` does."""
        self._store = store
        self._bundle = bundle
        self._threads = threads
        self._report = report
        self._provider = provider
        self._ahead = ahead
        self._batch_size = batch_size
        self._free_memory = free_memory
        self._dtype = np.dtype(dtype)
        self._reader = reader or SampleReader(reader_of(bundle))
        dims = bundle.manifest.dims
        self._shape = (dims.tokens, dims.hidden)
        self._feature = dims.feature

    def precise(self) -> Features[S_co]:
        """The same features and store, with states in fp32."""
        precise = copy.copy(self)
        precise._dtype = np.dtype(np.float32)
        return precise

    def frozen(self, samples: Sequence[Sample], level: int) -> HiddenStates:
        """The states below the suffix of `level`, without LoRA in the prefix.

        A pass over missing samples also stores the states of the lower levels and of the next ones, and the pooled
        features, so that a change of level seldom needs a pass: SAL raises the level, and stage 2 begins at level 1.

        Raises SampleChangedError if a sample's file has changed.
        """
        folder = self._folders(level)[f"hidden_{level}"]
        for _ in self._extract(self._to_store(folder, samples), level):
            pass
        return self._states(folder, samples, partial(self._frozen, level=level))

    def lifted(self, samples: Sequence[Sample], from_level: int, to_level: int, theta: Vector) -> HiddenStates:
        """The states below the suffix of `to_level`, with the LoRA of `theta` (P,) in blocks from `from_level`."""
        if from_level <= to_level:
            return self.frozen(samples, to_level)
        blocks = self._bundle.manifest.dims.blocks
        parts = self._bundle.expert.parts
        loras = {block: theta[parts[str(block)]] for block in range(blocks - from_level, blocks - to_level)}
        digest = hashlib.sha256(b"".join(lora.tobytes() for lora in loras.values())).hexdigest()[:16]
        folder = self._folder(f"level-{to_level}-above-{from_level}-{digest}", Priority.DERIVED)
        lift = partial(self._lift, from_level=from_level, loras=loras)
        missing, done = self._to_store(folder, samples), 0
        for part, states in lift(missing):
            self._keep(folder, part, states)
            done += len(part)
            self._report("features", done, len(missing))
        return self._states(folder, samples, lift)

    def pooled(self, samples: Sequence[Sample], level: int) -> Floats:
        """Pooled features (n, F) of the frozen backbone. A pass for missing samples also stores hidden states."""
        folder = self._folder(POOLED, Priority.SMALL)
        rows = {sample.sha256: self._store.get(folder, sample.sha256) for sample in samples}
        for part, features in self._extract([s for s in samples if rows[s.sha256] is None], level):
            rows.update((sample.sha256, row.tobytes()) for sample, row in zip(part, features, strict=True))
        data = b"".join(rows[sample.sha256] or b"" for sample in samples)
        return np.frombuffer(data, np.float32).reshape(-1, self._feature)

    def _folder(self, name: str, priority: Priority) -> str:
        computed = "" if self._provider == CPU else f"-{self._provider}"
        folder = f"{self._bundle.features_key}-{inputs.DECODING}{computed}-{self._dtype.name}-{name}"
        self._store.use(folder, priority)
        return folder

    def _folders(self, level: int) -> dict[str, str]:
        """The folder for each output of a pass: the states of the levels up to those ahead of `level`, which is needed
        now, and pooled features. NO_LEVEL: of all levels."""
        highest = self._bundle.manifest.levels
        levels = range(highest if level == NO_LEVEL else min(level + self._ahead, highest), 0, -1)
        rank = {level: Priority.PRESENT}
        states = {f"hidden_{k}": self._folder(f"level-{k}", rank.get(k, Priority.AHEAD)) for k in levels}
        return {**states, POOLED: self._folder(POOLED, Priority.SMALL)}

    def _to_store(self, folder: str, samples: Sequence[Sample]) -> list[Sample]:
        """The missing samples, as many as fit in the store."""
        missing = [sample for sample in samples if not self._store.has(folder, sample.sha256)]
        return missing[: self._store.capacity(folder, self._dtype.itemsize * self._shape[0] * self._shape[1])]

    def _states(
        self, folder: str, samples: Sequence[Sample], compute: Callable[[Sequence[Sample]], Computed]
    ) -> HiddenStates:
        return HiddenStates(folder, samples, self._batch_size, partial(self._read, folder, compute))

    def _read(self, folder: str, compute: Callable[[Sequence[Sample]], Computed], samples: Sequence[Sample]) -> Floats:
        states = np.empty((len(samples), *self._shape), np.float32)
        missing = []
        for row, sample in enumerate(samples):
            data = self._store.get(folder, sample.sha256)
            if data is None:
                missing.append(row)
            else:
                states[row] = np.frombuffer(data, self._dtype).reshape(self._shape)
        for part, found in compute([samples[row] for row in missing]):
            self._keep(folder, part, found)
            rows, missing = missing[: len(part)], missing[len(part) :]
            states[rows] = found.astype(self._dtype)  # rounded as if read from the store
        return states

    def _keep(self, folder: str, samples: Sequence[Sample], rows: Floats) -> None:
        dtype = self._dtype if rows.ndim == 3 else rows.dtype  # pooled features stay fp32
        for sample, row in zip(samples, rows, strict=True):
            self._store.put(folder, sample.sha256, row.astype(dtype).tobytes())

    def _extract(self, samples: Sequence[Sample], level: int) -> Computed:
        """Runs passes and stores their outputs, but not the states of a level that are all stored. Yields samples and
        their pooled features (B, F): always, because `pooled` may have found stored ones damaged."""
        folders, done = self._folders(level), 0
        for name, folder in list(folders.items()):
            if name != POOLED and all(self._store.has(folder, sample.sha256) for sample in samples):
                del folders[name]
        for part, found in self._passes(samples, list(folders)):
            for folder, rows in zip(folders.values(), found, strict=True):
                self._keep(folder, part, rows)
            done += len(part)
            self._report("features", done, len(samples))
            yield part, found[-1]

    def _frozen(self, samples: Sequence[Sample], level: int) -> Computed:
        return ((part, states) for part, (states,) in self._passes(samples, [f"hidden_{level}"]))

    def _passes(self, samples: Sequence[Sample], outputs: list[str]) -> Iterator[tuple[Sequence[Sample], list[Floats]]]:
        """Raises SampleChangedError if a sample's file has changed since its folder was scanned."""
        if not samples:
            return
        self._free_memory()
        session = open_session(self._bundle, "features.onnx", self._threads, provider=self._provider)
        for start in range(0, len(samples), self._batch_size):
            part = samples[start : start + self._batch_size]
            yield part, run(session, outputs, self._reader.batch(part))
        del session
        release_free_memory()

    def _lift(self, samples: Sequence[Sample], from_level: int, loras: Mapping[int, Vector]) -> Computed:
        states = self.frozen(samples, from_level)
        for start in range(0, len(samples), LIFTED_AT_ONCE):
            part = samples[start : start + LIFTED_AT_ONCE]
            hidden = states.read(part)
            self._free_memory()
            for block, lora in loras.items():
                session = open_session(self._bundle, f"lift-{block}.onnx", self._threads, provider=self._provider)
                for some in range(0, len(part), self._batch_size):
                    now = slice(some, some + self._batch_size)
                    (hidden[now],) = run(session, ["lifted"], {"hidden": hidden[now], "theta": lora})
                del session
            release_free_memory()
            yield part, hidden


class FeatureCache(Features[DiskCache]):
    """The features of a device, on its disk within a budget."""

    def has(self, sample: Sample, level: int) -> bool:
        """Whether a sample's state at the level and its pooled features are stored, so that its file is not needed."""
        folders = self._folders(level)
        return all(self._store.has(folders[name], sample.sha256) for name in (f"hidden_{level}", POOLED))

    def drop_unused(self) -> None:
        """Deletes the states above an expert's LoRA that were not used since the last call. Those of the frozen
        backbone and pooled features stay, because other levels come again."""
        self._folders(NO_LEVEL)
        self._store.drop_unused()

    @property
    def used(self) -> int:
        """Bytes of disk."""
        return self._store.used

    def keep_free(self) -> None:
        """Deletes states until `keep_free` bytes of the disk are free (see `DiskCache`)."""
        self._store.keep_free()

    def drop_others(self, samples: Iterable[Sample]) -> None:
        """Deletes the states and features of all samples but these."""
        self._store.drop_others({sample.sha256 for sample in samples})

    def evict_all(self) -> None:
        """Deletes everything to free the disk. States are computed again when they are needed."""
        self._store.evict_all()
