"""The page's routes. Files are named by their numbers in the queue, so that no request holds a path."""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, RedirectResponse, Response
from starlette.routing import Route

from edge_runtime.data.unreadable import UnreadableError
from edge_runtime.labelling.answers import Answered, Answers, Kind
from edge_runtime.labelling.asking import Asked, Asking
from edge_runtime.labelling.destination import Destination
from edge_runtime.labelling.queue import Queue, WaitingFile
from edge_runtime.page.device import skipped_files, state_of
from edge_runtime.page.thumbnails import SIZES, Thumbnails
from edge_runtime.store import DeviceStore
from fedfmsl.errors import FedFMSLError, InputError, one_line, shown
from fedfmsl.web.application import error_page, fragment, page
from fedfmsl.web.stream import stream

FILES = Path(__file__).parent / "files"
RECENT = 12  # predictions with pictures
KEYS = 9  # classes with a key of their own
BUTTONS = 60  # classes as buttons; more are a list
EXCERPT = 1000  # characters of a text
STATE_SECONDS = 2.0  # between two updates of an open page


@dataclass(frozen=True)
class Desk:
    """What the routes work with. `watched`: whether files are asked about at all."""

    store: DeviceStore
    queue: Queue
    destination: Destination
    asking: Asking
    answers: Answers
    thumbnails: Thumbnails
    watched: bool


def routes(desk: Desk) -> list[Route]:
    def bound(view: Callable[[Desk, Request], Any]) -> Callable[[Request], Any]:
        async def answered(request: Request) -> Response:
            try:
                response: Response = await run_in_threadpool(view, desk, request)
            except (FedFMSLError, OSError) as error:  # as a labels file that is missing, or a full disk
                return error_page(request, 500, one_line(error))
            return response

        return functools.wraps(view)(answered)

    return [
        Route("/", bound(_device)),
        Route("/live", bound(_live)),
        Route("/ask", bound(_ask), methods=["GET", "POST"]),
        Route("/undo", bound(_undo), methods=["POST"]),
        Route("/skipped", bound(_skipped)),
        Route("/file/{number:int}/{size:str}.jpg", bound(_picture)),
        Route("/page.js", lambda _: FileResponse(FILES / "page.js", media_type="text/javascript")),
        Route("/page.css", lambda _: FileResponse(FILES / "page.css", media_type="text/css")),
    ]


def _device(desk: Desk, request: Request) -> Response:
    return page(request, "device.html", **_state(desk))


def _live(desk: Desk, request: Request) -> Response:
    def elements() -> dict[str, str]:
        state = _state(desk)
        return {name: fragment(request, f"{name}.html", **state) for name in ("state", "recent")}

    return stream(elements, STATE_SECONDS)


def _state(desk: Desk) -> dict[str, Any]:
    recent = [_shown_file(desk, file) for file in desk.queue.recent(RECENT)]
    return {
        **state_of(desk.store),
        "recent": recent,
        "waiting": desk.queue.count() if desk.watched else None,
        "is_text": _is_text(desk),
    }


def _ask(desk: Desk, request: Request) -> Response:
    if request.method == "POST":
        try:
            _answer(desk, request.state.form)
        except InputError as error:
            return _question(desk, request, str(error), 409)
        return RedirectResponse("/ask", 303)
    return _question(desk, request)


def _undo(desk: Desk, request: Request) -> Response:
    try:
        desk.answers.undo()
    except InputError as error:
        return _question(desk, request, str(error), 409)
    desk.asking.again()
    return RedirectResponse("/ask", 303)


def _answer(desk: Desk, form: dict[str, str]) -> None:
    """Fields: `file-NUMBER` for each file, and `class` (its name) or `answer` (unlisted, delete, or new: then `new` is
    the name of a class).

    Raises InputError if the form is not of this page, or as `Answers.answer` does.
    """
    try:
        numbers = [int(name.removeprefix("file-")) for name in form if name.startswith("file-")]
        is_new = form.get("answer") == "new"
        kind = Kind.LABEL if is_new or "class" in form else Kind(form["answer"])
        label = unicodedata.normalize("NFC", form["new"].strip()) if is_new else form.get("class", "")
    except (ValueError, KeyError) as error:
        raise InputError("this answer is of another page; reload it and answer again") from error
    if not numbers:
        raise InputError("no picture is chosen; tick at least one")
    desk.answers.answer(numbers, kind, label, is_new)


def _question(desk: Desk, request: Request, problem: str = "", status: int = 200) -> Response:
    classes = desk.queue.classes
    asked = desk.asking.next(1) if desk.watched and classes else []
    last = desk.answers.undoable()
    new: tuple[str, ...] = ()
    try:
        new = desk.destination.new_classes if classes else ()
    except InputError as error:  # the disk of the samples is away
        problem = problem or str(error)
    names = (*classes, *new)
    values: dict[str, Any] = {
        "problem": problem,
        "watched": desk.watched,
        "waiting": desk.queue.count(),
        "noun": desk.queue.noun,
        "is_text": _is_text(desk),
        "last": _describe(last) if last else "",
        "files": [_shown_file(desk, file) for file in asked[0].files] if asked else [],
        "guess": _guess(asked[0], classes) if asked else None,
        "classes": [(name, str(index + 1) if index < KEYS else "") for index, name in enumerate(names)],
        "as_list": len(names) > BUTTONS,
    }
    return page(request, "ask.html", status, **values)


def _guess(asked: Asked, classes: tuple[str, ...]) -> tuple[str, float] | None:
    """The name and the probability of the most probable class of the first file."""
    (name, share), *_ = asked.files[0].guesses or (("", 0.0),)
    return (name, share) if name in classes else None


def _describe(answered: Answered) -> str:
    what = {Kind.LABEL: answered.label, Kind.UNLISTED: "not in the list", Kind.DELETE: "deleted"}[answered.kind]
    return what if answered.files == 1 else f"{what} ({answered.files} files)"


def _skipped(desk: Desk, request: Request) -> Response:
    reasons, files, more = skipped_files(desk.store)
    return page(request, "skipped.html", reasons=reasons, files=files, more=more)


def _picture(desk: Desk, request: Request) -> Response:
    size = SIZES.get(request.path_params["size"])
    found = desk.queue.get([request.path_params["number"]])
    if size is None or not found:
        raise HTTPException(404, "There is no such picture.")
    try:
        picture = desk.thumbnails.get(desk.answers.where(found[0]), found[0].version, size)
    except UnreadableError as error:
        raise HTTPException(404, f"The picture cannot be shown: {error.reason}.") from error
    return Response(picture, media_type="image/jpeg")


def _shown_file(desk: Desk, file: WaitingFile) -> dict[str, Any]:
    """A file as the templates show it."""
    return {
        "number": file.id,
        "name": shown(file.path.name),
        "label": file.label,
        "share": file.guesses[0][1] if file.guesses else 0.0,
        "text": _excerpt(desk.answers.where(file)) if _is_text(desk) else "",
    }


def _excerpt(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(4 * EXCERPT).decode("utf-8", "replace")[:EXCERPT]
    except OSError:
        return ""


def _is_text(desk: Desk) -> bool:
    return desk.queue.noun == "text"
