"""Stores what the device's page asks about: predictions and features of the files in the watched folder."""

from __future__ import annotations

import contextlib
from pathlib import Path

from edge_runtime.inference.classifier import StateClassifier
from edge_runtime.labelling.queue import Queue, is_gone, version_of
from fedfmsl.common.cli import notice
from fedfmsl.common.folder_walk import FileVersion
from fedfmsl.errors import ConfigError, InputError
from fedfmsl.protocol.messages import Prediction

CHECKED = 50  # waiting files that `improve` looks for at once


class Recorder:
    """A full disk or a damaged queue is reported once; files that arrive in the meantime are not asked about."""

    def __init__(self, path: Path, classifier: StateClassifier) -> None:
        """`path`: of the queue."""
        self._path = path
        self._queue: Queue | None = None
        self._classifier = classifier
        self._failed = False
        self._described: tuple[str, ...] = ()
        self._checked = 0  # number of the file that was looked for last

    def record(self, path: Path, version: FileVersion, prediction: Prediction) -> None:
        """Computes the feature of a file that is new, and stores it with the prediction."""
        path = path.parent.resolve() / path.name  # compared with the sample folder
        try:
            queue = self._opened()
            feature = queue.feature_of(path, version)
            if feature is None:
                feature = self._classifier.feature(path)
            queue.put(path, version, prediction, feature)
            self._failed = False
        except (OSError, ConfigError) as error:
            self._queue = None  # somebody may delete a damaged one
            if not self._failed:
                notice(f"the page cannot ask about new files: {error}")
            self._failed = True

    def improve(self) -> None:
        """Classifies the least certain waiting file again if its prediction is of another round, for a better order.
        To be called when nothing else is to be done.

        Forgets waiting files that are gone or can no longer be read: the queue would grow while nobody answers.
        """
        with contextlib.suppress(OSError, ConfigError):
            queue = self._opened()
            self._forget_gone(queue)
            self._classifier.refresh()
            found = queue.of_another_round(self._classifier.round)
            if found is None:
                return
            number, path = found
            try:
                if (version := version_of(path)) is not None:
                    self.record(path, version, self._classifier.classify_again(path))
            except InputError:
                queue.forget([number])

    def _forget_gone(self, queue: Queue) -> None:
        files = queue.waiting_after(self._checked, CHECKED)
        queue.forget([number for number, path in files if is_gone(path)])
        self._checked = files[-1][0] if len(files) == CHECKED else 0

    def _opened(self) -> Queue:
        """The queue, which has the classes of the present model."""
        if self._queue is None:
            self._queue, self._described = Queue(self._path), ()
        classes = tuple(self._classifier.classes)
        if classes != self._described:
            self._queue.describe(classes, self._classifier.kind.noun)
            self._described = classes
        return self._queue
