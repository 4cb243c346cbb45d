"""Retries after a failed write, while the disk is full or read-only: frees space, and waits with backoff."""

from __future__ import annotations

import contextlib
import logging
import time

from edge_runtime.data.features import FeatureCache
from edge_runtime.store import DeviceStore
from fedfmsl.common.backoff import Backoff
from fedfmsl.common.files import FULL, NO_DESCRIPTORS, has_descriptors

logger = logging.getLogger(__name__)


class DiskRetry:
    """A result is sent only after it is written, so a failed attempt can be repeated."""

    def __init__(self, store: DeviceStore, cache: FeatureCache, backoff: Backoff) -> None:
        self._store = store
        self._cache = cache
        self._backoff = backoff
        self._failures = 0
        self._due = 0.0

    @property
    def waiting(self) -> bool:
        """Whether the next attempt is not due yet."""
        return time.monotonic() < self._due

    def failed(self, error: OSError, required_globals: set[str], evict: bool) -> None:
        """Logs the first failure, and deletes what can be received or computed again. The first retry is due at once.

        `required_globals`: SHA-256 of the global blobs to keep. `evict`: also empty the feature cache, which no other
        thread may use then.
        """
        may_open = has_descriptors()  # otherwise the disk is not what fails
        if not self._failures:
            disk = "retrying until there is free space" if error.errno in FULL else "retrying; check the disk"
            remedy = disk if may_open else f"retrying: {NO_DESCRIPTORS}"
            logger.warning(f"--state {self._store.root}: cannot write ({error}); {remedy}")
        with contextlib.suppress(OSError):  # a read-only disk
            if evict and may_open:
                self._cache.evict_all()
            self._store.globals.keep_only(required_globals)
        self._due = time.monotonic() + (self._backoff.delay(self._failures - 1) if self._failures else 0.0)
        self._failures += 1

    def succeeded(self) -> None:
        self._failures = 0
        self._due = 0.0
