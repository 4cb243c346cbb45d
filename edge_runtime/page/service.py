"""Serves the device's page until its output is closed or the process is interrupted."""

from __future__ import annotations

import select
import sys
from pathlib import Path

from edge_runtime.labelling.answers import Answers
from edge_runtime.labelling.asking import Asking
from edge_runtime.labelling.destination import Destination
from edge_runtime.labelling.queue import Queue
from edge_runtime.page.thumbnails import Thumbnails
from edge_runtime.page.views import Desk, routes
from edge_runtime.settings import Settings
from edge_runtime.store import DeviceStore
from fedfmsl.common.token_file import stored_token
from fedfmsl.errors import ConfigError
from fedfmsl.transport.address import is_loopback
from fedfmsl.transport.listening import listen, parse_listen
from fedfmsl.web.access import Access
from fedfmsl.web.application import application
from fedfmsl.web.serve import WebServer, page_context

FLAG = "--page"


def serve(settings: Settings) -> None:
    """Prints the page's address. Raises ConfigError or RunError if it cannot be served."""
    if settings.page is None:
        raise ConfigError(f"{FLAG} is missing; give the address of the page, like {FLAG} 127.0.0.1:8080")
    store = DeviceStore(settings.state)
    host, port = parse_listen(settings.page)
    context = page_context(host, store.renewed.newest(settings.identity))
    token = None if is_loopback(host) else stored_token(store.page_token)
    try:
        desk = open_desk(store, settings.images.resolve(), settings.labels, settings.watch is not None)
    except OSError as error:
        raise ConfigError(f"{error}; run the command as the daemon's user, or free some disk space") from error
    access = Access(host, port, token, context is not None)
    title = store.name() or "Device"
    app = application(title, routes(desk), access, Path(__file__).parent / "templates")
    with WebServer(app, listen(FLAG, host, port), context) as server:
        print(f"the page of this device is {server.url}" + (f"; its token is in {store.page_token}" if token else ""))
        sys.stdout.flush()
        _wait_for_closed_output()


def open_desk(store: DeviceStore, images: Path, labels: Path | None, watched: bool) -> Desk:
    queue = Queue(store.questions)
    destination = Destination(images, labels, queue)
    asking, answers = Asking(queue, destination), Answers(queue, destination, store.trash)
    return Desk(store, queue, destination, asking, answers, Thumbnails(), watched)


def _wait_for_closed_output() -> None:
    """The daemon that has started this process has ended, also if it was killed."""
    poll = select.poll()
    poll.register(sys.stdout, 0)
    while not any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll()):
        pass
