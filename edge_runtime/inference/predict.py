"""Classify images or texts, files or whole folders of them."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from edge_runtime.data.inputs import Kind
from edge_runtime.inference.classifier import Classifier
from fedfmsl.common.cli import notice
from fedfmsl.errors import InputError
from fedfmsl.protocol.messages import Prediction


def predict_files(classifier: Classifier, files: Sequence[Path]) -> Iterator[Prediction]:
    """One for each image or text of `files` and of the folders in it.

    Raises InputError if there is no file of the kind that the model takes, and in the end if some could not be read:
    of several each is mentioned.
    """
    kind = classifier.kind
    paths = [path for file in files for path in _files(file, kind)]
    if not paths:
        raise InputError(f"no {kind.noun}s in {', '.join(map(str, files))}")
    unread: list[InputError] = []
    for path in paths:
        try:
            yield classifier.classify(path)
        except InputError as error:
            unread.append(error)
            if len(paths) > 1:
                notice(str(error))
    if len(paths) > 1 and unread:
        raise InputError(f"{len(unread)} of {len(paths)} {kind.noun}s could not be classified")
    if unread:
        raise unread[0]


def printer(as_json: bool, top: int) -> Callable[[Prediction | None], None]:
    """What prints one line for each prediction: all of it as JSON, or the `top` most probable classes.

    None stands for a pause. Raises BrokenPipeError if nobody reads any more.
    """

    def tell(prediction: Prediction | None) -> None:
        if prediction is not None:
            print(prediction.model_dump_json() if as_json else _in_words(prediction, top), flush=True)
        elif _reader_has_gone():
            raise BrokenPipeError

    return tell


@contextmanager
def quiet_without_a_reader() -> Iterator[None]:
    """That nobody reads the output any more, as when the daemon was killed, is an end like any other."""
    try:
        yield
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what Python flushes when it ends


def _reader_has_gone() -> bool:
    poll = select.poll()
    poll.register(sys.stdout, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _in_words(prediction: Prediction, top: int) -> str:
    best = sorted(prediction.probabilities.items(), key=lambda item: -item[1])[:top]
    shares = ", ".join(f"{name} {value:.1%}" for name, value in best)
    known = prediction.label in prediction.probabilities
    return f"{prediction.file}: {shares if known else f'{prediction.label} ({shares})'}"


def _files(path: Path, kind: Kind) -> list[Path]:
    if path.is_dir():
        return kind.files(path)
    if not path.is_file():
        raise InputError(f"{kind.noun} {path} does not exist")
    return [path]
