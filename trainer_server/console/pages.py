"""The pages of the console, and the actions of the operator. Nothing else can be written."""

from __future__ import annotations

import logging
import sqlite3
import tempfile
import zipfile
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import IO, Any

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from fedfmsl.common.whole_folder import read_folder
from fedfmsl.errors import ConfigError, RunError
from fedfmsl.protocol.class_names import normal_form, split_names
from fedfmsl.web.access import Access
from fedfmsl.web.application import application, fragment, page
from fedfmsl.web.stream import stream
from trainer_server.console import views
from trainer_server.console.snapshot import RunReader, Runs, Snapshot
from trainer_server.coordinator.operator import Action, Operation, classes_to_add
from trainer_server.coordinator.proposals import why_not_new
from trainer_server.storage.kept_experts import KeptExperts
from trainer_server.storage.operations import Operations

logger = logging.getLogger(__name__)

TEMPLATES = Path(__file__).parent / "templates"
LOG = "notes.log"
LOG_TAIL = 64 * 1024  # bytes of the log on its page
EXPERT = "global_expert"
IN_MEMORY = 1 << 20  # of a download, before it goes to a file
QUESTIONS = {
    Action.PAUSE: "Pause the run? No round opens or closes, and no deadline passes, until you resume it. Devices "
    "finish what they compute.",
    Action.RESUME: "Resume the run?",
    Action.CLOSE: "Close round {round} now, with the updates that have arrived? With too few of them it is repeated.",
    Action.EXCLUDE: "Exclude {device} from this run? Its updates are refused, and the update that it has sent in this "
    "round does not count. Revoke its identity as well if others could have it.",
    Action.INCLUDE: "Let {device} take part again, from the next round on?",
    Action.DEADLINE: "Change the round deadline to {seconds:g} seconds, also of the present round?",
    Action.ROLLBACK: "Return to the global expert that round {round} has made? The updates of the present round do not "
    "count. After stage 1, stage 2 begins again.",
    Action.CLASSES: "Add {classes} after the present round? Devices take it up without a restart, and a class is never "
    "removed within a run.",
    Action.WITHDRAW: "Withdraw {classes}, so that it is not added after the present round?",
    Action.DOWNLOAD: "Download the global expert as a PEFT adapter?",
}
Values = Callable[[Request, Snapshot], Mapping[str, Any]]


def console(folder: Path, access: Access) -> Starlette:
    """The application for the run in `folder`, or for the runs below it."""
    routes = [
        Route("/", _runs),
        Route("/runs/{key}/", _overview),
        Route("/runs/{key}/live", _live_overview),
        Route("/runs/{key}/devices", _devices),
        Route("/runs/{key}/devices/live", _live_devices),
        Route("/runs/{key}/rounds", _rounds),
        Route("/runs/{key}/rounds/live", _live_rounds),
        Route("/runs/{key}/rounds/{number:int}", _round),
        Route("/runs/{key}/log", _log),
        Route("/runs/{key}/log/live", _live_log),
        Route("/runs/{key}/log.txt", _whole_log),
        Route("/runs/{key}/action", _action, methods=["GET", "POST"]),
    ]
    app = application("Console", routes, access, TEMPLATES, views.FILTERS)
    app.state.runs = Runs(folder)
    app.state.environment.globals |= {"state_of": views.state_of, "STATES": views.STATES}
    return app


async def _reader(request: Request) -> RunReader:
    reader: RunReader | None = await run_in_threadpool(request.app.state.runs.reader, request.path_params["key"])
    if reader is None:
        raise HTTPException(404, "There is no such run.")
    return reader


async def _runs(request: Request) -> Response:
    readers: list[RunReader] = await run_in_threadpool(request.app.state.runs.readers)
    if len(readers) == 1:
        return RedirectResponse(f"/runs/{readers[0].key}/", 307)
    snapshots = [await run_in_threadpool(reader.snapshot) for reader in readers]
    return page(request, "runs.html", snapshots=snapshots)


async def _show(request: Request, template: str, values: Values) -> Response:
    reader = await _reader(request)
    snapshot = await run_in_threadpool(reader.snapshot)
    shown = await run_in_threadpool(values, request, snapshot)
    return page(request, template, run=snapshot, **shown)


async def _live(request: Request, values: Values, *names: str) -> Response:
    """Streams the elements with these ids, from the templates of these names."""
    reader = await _reader(request)

    def elements() -> Mapping[str, str]:
        snapshot = reader.snapshot()
        shown = {"run": snapshot, **values(request, snapshot)}
        return {name: fragment(request, f"_{name}.html", **shown) for name in ("head", *names)}

    return stream(elements)


# overview


def _overview_values(request: Request, snapshot: Snapshot) -> Mapping[str, Any]:
    online = sum(views.device_state(snapshot, *item)[0] == "online" for item in snapshot.devices.items())
    own, novel = views.test_accuracy(snapshot)
    missing = views.missing(snapshot)
    return {
        "online": online,
        "missing": missing[: views.SHOWN_MISSING],
        "more_missing": max(len(missing) - views.SHOWN_MISSING, 0),
        "held_out": views.last_mean(snapshot, "held_out_mofm", "held_out_global"),
        "own": own,
        "novel": novel if novel is not None else views.last_mean(snapshot, "held_out_novel"),
        "gate": views.last_mean(snapshot, "mean_local_weight"),
        "up": sum(summary.bytes_up for summary, _ in snapshot.closed),
        "down": sum(summary.bytes_down for summary, _ in snapshot.closed),
        "budgets": views.privacy_budgets(snapshot),
        "charts": views.charts(snapshot),
        "proposed": views.proposed(snapshot),
        "has_expert": (snapshot.folder / EXPERT).is_dir(),
        "refused": sum(each.count for counts in snapshot.refusals.values() for each in counts),
    }


async def _overview(request: Request) -> Response:
    def values(request: Request, snapshot: Snapshot) -> Mapping[str, Any]:
        return {
            **_overview_values(request, snapshot),
            "settings": views.settings(snapshot),
        }

    return await _show(request, "overview.html", values)


async def _live_overview(request: Request) -> Response:
    return await _live(request, _overview_values, "facts", "missing", "proposed", "charts", "actions")


# devices


def _devices_values(request: Request, snapshot: Snapshot) -> Mapping[str, Any]:
    query = request.query_params
    search, only = query.get("search", "")[:64], query.get("state", "")
    shown, part = views.part(views.names(snapshot, search, only), _number(query.get("page", "1")))
    return {
        "rows": [views.row(snapshot, name) for name in shown],
        "part": part,
        "search": search,
        "only": only,
        "unknown": _unknown(snapshot),
    }


def _unknown(snapshot: Snapshot) -> list[Any]:
    """Refusals of senders that are no devices of the run."""
    return [each for name, counts in snapshot.refusals.items() if name not in snapshot.devices for each in counts]


async def _devices(request: Request) -> Response:
    return await _show(request, "devices.html", _devices_values)


async def _live_devices(request: Request) -> Response:
    return await _live(request, _devices_values, "devices", "unknown")


# rounds


def _rounds_values(request: Request, snapshot: Snapshot) -> Mapping[str, Any]:
    shown, part = views.part(snapshot.closed[::-1], _number(request.query_params.get("page", "1")))
    return {"rounds": shown, "part": part, "metrics": views.HELD_OUT}


async def _rounds(request: Request) -> Response:
    return await _show(request, "rounds.html", _rounds_values)


async def _live_rounds(request: Request) -> Response:
    return await _live(request, _rounds_values, "rounds")


async def _round(request: Request) -> Response:
    reader = await _reader(request)
    number = request.path_params["number"]
    snapshot = await run_in_threadpool(reader.snapshot)
    try:
        record = await run_in_threadpool(reader.record, number) if number < 2**31 else None
    except (RunError, sqlite3.Error, OSError, ValueError) as error:
        raise HTTPException(503, "The files of the run cannot be read at this moment. Reload the page.") from error
    if record is None:
        raise HTTPException(404, f"Round {number} is not closed.")
    shown, part = views.part(sorted(record.updates.items()), _number(request.query_params.get("page", "1")))
    return page(
        request,
        "round.html",
        run=snapshot,
        record=record,
        updates=shown,
        part=part,
        metrics=views.metrics_of(record),
        is_kept=number in await run_in_threadpool(KeptExperts(reader.folder).rounds),
    )


def _number(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 9 else 1


# log


def _log_values(request: Request, snapshot: Snapshot) -> Mapping[str, Any]:
    return {"lines": _tail(snapshot.folder / LOG)}


def _tail(path: Path) -> list[str]:
    """The last lines of a log, the newest first."""
    try:
        with path.open("rb") as file:
            end = file.seek(0, 2)
            file.seek(max(end - LOG_TAIL, 0))
            text = file.read(LOG_TAIL).decode("utf-8", "replace")
    except OSError:
        return []
    lines = text.splitlines()
    return (lines[1:] if end > LOG_TAIL else lines)[::-1]


async def _log(request: Request) -> Response:
    return await _show(request, "log.html", _log_values)


async def _live_log(request: Request) -> Response:
    return await _live(request, _log_values, "log")


async def _whole_log(request: Request) -> Response:
    reader = await _reader(request)
    try:
        file = (reader.folder / LOG).open("rb")
    except OSError as error:
        raise HTTPException(404, "This run has no log yet.") from error
    return _download(file, "text/plain; charset=utf-8", f"{LOG}.txt")


# actions


async def _action(request: Request) -> Response:
    """GET asks for a confirmation, POST carries out."""
    reader = await _reader(request)
    snapshot = await run_in_threadpool(reader.snapshot)
    form: Mapping[str, str] = request.state.form if request.method == "POST" else request.query_params
    operation = _operation(form, request.client.host if request.client else "", request.scope.get("operator", ""))
    if operation.action is not Action.DOWNLOAD and snapshot.ended is not None:
        raise HTTPException(409, "The run has ended; nothing can be changed.")
    pending = classes_to_add(snapshot.server.adds if snapshot.server else (), snapshot.waiting)
    if operation.action is Action.CLASSES and (why := why_not_new(operation.classes, snapshot.classes, pending)):
        raise HTTPException(409, f"No class is added: {why}.")
    if operation.action is Action.WITHDRAW and not {*operation.classes} <= {*pending}:
        raise HTTPException(409, "This class does not wait to be added any more.")
    if request.method == "GET":
        return page(
            request,
            "confirm.html",
            run=snapshot,
            question=QUESTIONS[operation.action].format(
                **{**operation.model_dump(), "classes": ", ".join(operation.classes)}
            ),
            operation=operation,
        )
    archive = await run_in_threadpool(_archive, snapshot) if operation.action is Action.DOWNLOAD else None
    try:
        if snapshot.ended is None and not await run_in_threadpool(Operations(snapshot.folder).add, operation):
            raise HTTPException(409, "Too many actions wait for the server. Is it running?")
    except OSError as error:
        raise HTTPException(507, f"The action cannot be stored ({error.strerror}). Is the disk full?") from error
    logger.info("%s: %s, by %s", snapshot.folder, operation.action.value, f"{operation.name} {operation.by}".strip())
    if archive is not None:
        return _download(archive, "application/zip", f"{snapshot.origin.config.run}-global-expert.zip")
    return RedirectResponse(f"/runs/{reader.key}/{'devices' if operation.device else ''}", 303)


def _operation(form: Mapping[str, str], by: str, name: str) -> Operation:
    fields = {name: form[name] for name in ("action", "device", "round", "seconds") if form.get(name)}
    try:
        classes = tuple(map(normal_form, split_names(form.get("classes", ""))))
        operation = Operation.model_validate({**fields, "classes": classes, "by": by, "name": name})
    except (ValidationError, ConfigError) as error:
        raise HTTPException(400, "This is no action, or one of its values is not possible.") from error
    if operation.action in (Action.EXCLUDE, Action.INCLUDE) and not operation.device:
        raise HTTPException(400, "Name a device.")
    if operation.action in (Action.CLASSES, Action.WITHDRAW) and not operation.classes:
        raise HTTPException(400, "Name a class.")
    if operation.action is Action.DEADLINE and operation.seconds < 1:
        raise HTTPException(400, "A round lasts at least a second.")
    return operation


def _archive(snapshot: Snapshot) -> IO[bytes]:
    """The files of the global expert as a ZIP file."""
    try:
        files = read_folder(snapshot.folder / EXPERT)
    except OSError as error:
        raise HTTPException(404, "There is no global expert yet: the first round of stage 1 is not closed.") from error
    file = tempfile.SpooledTemporaryFile(IN_MEMORY)  # noqa: SIM115
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in files.items():
            archive.writestr(f"{EXPERT}/{name}", data)
    file.seek(0)
    return file


def _download(file: IO[bytes], media_type: str, name: str) -> Response:
    async def blocks() -> AsyncIterator[bytes]:
        with file:
            while block := await run_in_threadpool(file.read, 1 << 16):
                yield block

    headers = {"Content-Disposition": f'attachment; filename="{name}"'}
    return StreamingResponse(blocks(), media_type=media_type, headers=headers)
