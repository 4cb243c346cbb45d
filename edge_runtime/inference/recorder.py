"""Stores what the device's page asks about: predictions and features of the files in the watched folder."""

from __future__ import annotations

import contextlib
from pathlib import Path

from edge_runtime.inference.classifier import StateClassifier
from edge_runtime.labelling.queue import Queue, version_of
from fedfmsl.common.cli import notice
from fedfmsl.common.folder_walk import FileVersion
from fedfmsl.errors import InputError
from fedfmsl.protocol.messages import Prediction

CHECKED = 50  # waiting files that `improve` looks for at once


class Recorder:
    """A full disk is reported once; files that arrive in the meantime are not asked about."""

    def __init__(self, queue: Queue, classifier: StateClassifier) -> None:
        self._queue = queue
        self._classifier = classifier
        self._failed = False
        self._described: tuple[str, ...] = ()
        self._checked = 0  # number of the file that was looked for last

    def record(self, path: Path, version: FileVersion, prediction: Prediction) -> None:
        """Computes the feature of a file that is new, and stores it with the prediction."""
        path = path.parent.resolve() / path.name  # compared with the sample folder
        try:
            self._describe()
            feature = self._queue.feature_of(path, version)
            if feature is None:
                feature = self._classifier.feature(path)
            self._queue.put(path, version, prediction, feature)
            self._failed = False
        except OSError as error:
            if not self._failed:
                notice(f"the page cannot ask about new files: {error}")
            self._failed = True

    def improve(self) -> None:
        """Classifies the least certain waiting file again if its prediction is of another round, for a better order.
        To be called when nothing else is to be done.

        Forgets waiting files that are gone or can no longer be read: the queue would grow while nobody answers.
        """
        with contextlib.suppress(OSError):
            self._forget_gone()
            self._classifier.refresh()
            found = self._queue.of_another_round(self._classifier.round)
            if found is None:
                return
            number, path = found
            try:
                if (version := version_of(path)) is not None:
                    self.record(path, version, self._classifier.classify_again(path))
            except InputError:
                self._queue.forget([number])

    def _forget_gone(self) -> None:
        files = self._queue.waiting_after(self._checked, CHECKED)
        self._queue.forget([number for number, path in files if _is_gone(path)])
        self._checked = files[-1][0] if len(files) == CHECKED else 0

    def _describe(self) -> None:
        classes = tuple(self._classifier.classes)
        if classes != self._described:
            self._queue.describe(classes, self._classifier.kind.noun)
            self._described = classes


def _is_gone(path: Path) -> bool:
    """Not if its folder is gone: its disk may come back."""
    try:
        path.stat()
    except FileNotFoundError:
        return path.parent.is_dir()
    except OSError:
        pass
    return False
