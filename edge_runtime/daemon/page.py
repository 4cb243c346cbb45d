"""The device's page as a process of its own: it has its own memory, and its faults do not reach the training."""

from __future__ import annotations

import logging
import socket
from pathlib import Path

from edge_runtime.inference.child_process import ChildProcess
from edge_runtime.settings import Settings
from edge_runtime.store import DeviceStore
from fedfmsl.common.token_file import stored_token
from fedfmsl.transport.address import is_loopback, netloc, parse_address
from fedfmsl.transport.identity import read_identity
from fedfmsl.transport.listening import ANY, listen, parse_listen

logger = logging.getLogger(__name__)


def page_process(settings: Settings, store: DeviceStore) -> ChildProcess:
    """`python -m edge_runtime page` with the settings of the daemon. Raises ConfigError or RunError if it could not be
    served now."""
    _check(settings, store)
    values: dict[str, str | Path | None] = {
        "run": settings.run,
        "state": settings.state,
        "images": settings.images,
        "labels": settings.labels,
        "watch": settings.watch,
        "page": settings.page,
        "identity": settings.identity,
    }
    arguments = ["page", *(["--insecure"] if settings.insecure else [])]
    for key, value in values.items():
        if value is not None:
            arguments += [f"--{key}", str(value)]
    return ChildProcess("the device's page", arguments, _on_line)


def _check(settings: Settings, store: DeviceStore) -> None:
    assert settings.page
    host, port = parse_listen(settings.page)
    if not is_loopback(host):
        stored_token(store.page_token)
        if settings.identity:
            read_identity(settings.identity).server_context()
    for listener in listen("--page", host, port):
        listener.close()


def address_of(settings: Settings) -> str:
    """The address of the page for other machines. "": there is no page, or only this machine reaches it."""
    if settings.page is None:
        return ""
    host, port = parse_listen(settings.page)
    if is_loopback(host):
        return ""
    if host in ANY:
        host = _own_address(settings.broker) or socket.gethostname()
    return f"{'https' if settings.identity else 'http'}://{netloc(host)}:{port}/"


def _own_address(broker: str) -> str:
    """The address that this machine has in the broker's network. "": it is not known. Sends nothing."""
    address = parse_address(broker)
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_DGRAM)
        with socket.socket(found[0][0], socket.SOCK_DGRAM) as probe:
            probe.connect(found[0][4])
            own = str(probe.getsockname()[0])
    except OSError:
        return ""
    return "" if is_loopback(own) else own


def _on_line(line: bytes) -> bool:
    logger.info(line.decode(errors="replace").strip())
    return True
