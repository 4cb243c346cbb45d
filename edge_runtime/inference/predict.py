"""Classifies image or text files and folders of them, and prints the predictions."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from edge_runtime.data.inputs import Kind
from edge_runtime.inference.classifier import Classifier
from fedfmsl.common.cli import notice, print_json
from fedfmsl.common.files import FOLDER, why_no_file
from fedfmsl.common.folder_walk import SkippedFile, summarize
from fedfmsl.errors import InputError, shown
from fedfmsl.protocol.messages import Prediction


def predict_files(classifier: Classifier, files: Sequence[Path]) -> Iterator[Prediction]:
    """Yields one prediction for each readable file of `files` and of the folders in it.

    Prints a notice for each path or file that cannot be read, and for each reason why files of a folder are not used.
    Raises InputError after the last prediction if there was one.
    """
    kind = classifier.kind
    errors: list[InputError] = []
    paths: list[Path] = []
    for each in files:
        try:
            paths += _files(each, kind)
        except InputError as error:
            errors.append(error)
    total = len(paths) + len(errors)
    for unusable in errors if total > 1 else ():
        notice(str(unusable))
    for path in paths:
        try:
            yield classifier.classify(path)
        except InputError as error:
            errors.append(error)
            if total > 1:
                notice(str(error))
    if errors and total > 1:
        raise InputError(f"{len(errors)} of {total} files could not be classified; see the lines above")
    if errors:
        raise errors[0]


def printer(as_json: bool, top: int) -> Callable[[Prediction | None], None]:
    """A function that prints a prediction as one line: as JSON, or with the `top` most probable classes.

    With None it prints nothing, but raises BrokenPipeError if the standard output is closed, as printing does.
    """

    def print_prediction(prediction: Prediction | None) -> None:
        if prediction is not None:
            if as_json:
                print_json(prediction.model_dump(mode="json"))
            else:
                print(_text_line(prediction, top), flush=True)
        elif _is_output_closed():
            raise BrokenPipeError

    return print_prediction


@contextmanager
def end_on_closed_output() -> Iterator[None]:
    """Ends without an error if the standard output is closed, for example because the daemon was killed."""
    try:
        yield
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes the output at exit


def _is_output_closed() -> bool:
    poll = select.poll()
    poll.register(sys.stdout, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _text_line(prediction: Prediction, top: int) -> str:
    best = sorted(prediction.probabilities.items(), key=lambda item: -item[1])[:top]
    shares = ", ".join(f"{name} {value:.1%}" for name, value in best)
    is_known = prediction.label in prediction.probabilities
    return f"{prediction.file}: {shares if is_known else f'{prediction.label} ({shares})'}"


def _files(path: Path, kind: Kind) -> list[Path]:
    """Raises InputError if the path is neither a file nor a folder with files of the kind."""
    reason = why_no_file(path)
    if not reason:
        return [path]
    if reason != FOLDER:
        raise InputError(f"{kind.noun} {shown(path)} {reason}; check the path")
    skipped: list[SkippedFile] = []
    found = kind.files(path, skipped)
    for line in summarize(skipped, path):
        notice(f"skipped: {line}")
    if not found:
        raise InputError(f"no {kind.noun}s in {shown(path)}: no file name has one of their suffixes")
    return found
