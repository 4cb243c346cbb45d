"""Renews this device's certificate by itself, at the authority of `devices.provision serve`.

When a third of the certificate's life is left, the device makes a new key and asks for its certificate; the present key
signs the request. A new key, because copies of the old one, as on a card that was replaced, then end with its last
certificate. The earlier certificate stays valid until it expires, so nothing is lost if a renewal fails: the device
tries again, several hundred times before it expires.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from edge_runtime.store.identity_store import IdentityStore
from fedfmsl.common.backoff import Backoff
from fedfmsl.common.files import write_atomically
from fedfmsl.errors import ConfigError, FedFMSLError
from fedfmsl.transport.authority_client import request_certificate
from fedfmsl.transport.enrollment import check_answer, name_in, new_key, renewal_request, require_key
from fedfmsl.transport.identity import Identity, describe_expiry, pem_blocks, read_identity

logger = logging.getLogger(__name__)

LEFT = 1 / 3  # of a certificate's life, when it is renewed
CHECK_SECONDS = 3600.0  # between two looks at the clock, which may be set
RETRY = Backoff(first=600.0, longest=6 * 3600.0, jitter=0.5)


class Renewal:
    """A thread that renews the identity in STATE/identity.pem. In that thread `renewed` is called with its path, and
    `failed` with the reason of a failure, or with "" after a success."""

    def __init__(
        self,
        store: IdentityStore,
        address: str,
        renewed: Callable[[Path], None],
        failed: Callable[[str], None],
    ) -> None:
        """`address`: HOST:PORT of the authority."""
        self._store = store
        self._address = address
        self._renewed = renewed
        self._failed = failed
        self._failures = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="renewal", daemon=True)

    def __enter__(self) -> Renewal:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._ended.set()  # the thread may wait for an answer; the process does not wait for it

    def _run(self) -> None:
        delay = 0.0
        while not self._ended.wait(delay):
            delay = self.step(time.time())

    def step(self, now: float) -> float:
        """Renews the identity if it is time to. Returns the seconds until the next step. `now`: unix seconds."""
        name = ""
        try:
            identity = read_identity(self._store.path)
            name = identity.name or ""
            if now < due(identity):
                return min(due(identity) - now, CHECK_SECONDS)
            later = renew(self._store, identity, self._address)
            self._renewed(self._store.path)
        except (FedFMSLError, OSError) as error:
            delay = RETRY.delay(self._failures, name)
            self._failures += 1
            self._failed(str(error))
            logger.warning(f"the certificate is not renewed: {error}; trying again in {delay / 60:.0f} min")
            return delay
        self._failures = 0
        self._failed("")
        assert later.valid is not None
        logger.info(f"renewed the certificate: {describe_expiry(later.valid[1].timestamp(), now, name)[0]}")
        return CHECK_SECONDS


def due(identity: Identity) -> float:
    """When an identity has to be renewed, in unix seconds."""
    if identity.valid is None:
        raise ConfigError(f"{identity.path} has no certificate of this device")
    start, end = (moment.timestamp() for moment in identity.valid)
    return end - (end - start) * LEFT


def renew(store: IdentityStore, identity: Identity, address: str) -> Identity:
    """Asks the authority at HOST:PORT `address`, and writes the renewed identity. Raises ConfigError if it refuses,
    RunError if it does not answer, OSError on a full disk."""
    present = next(
        block for kind, block in pem_blocks(identity.path.read_text("utf-8")) if kind.endswith("PRIVATE KEY")
    )
    name, key = identity.name or "", _next_key(store, present)
    answer = request_certificate(address, renewal_request(key, name, present), identity.authorities)
    certificate = next((block for kind, block in pem_blocks(answer) if kind == "CERTIFICATE"), "")
    if name_in(certificate) != name:
        raise ConfigError(f"{address} answers with a certificate of another device than {name}")
    check_answer(key, certificate, identity.authorities)
    store.write(f"{key.strip()}\n{certificate}\n{identity.authorities}\n")
    store.next_key.unlink(missing_ok=True)
    return read_identity(store.path)


def _next_key(store: IdentityStore, present: str) -> str:
    """The key of the request, in PEM: that of an unanswered one, so that it gets the same answer."""
    if store.next_key.is_file():
        key = store.next_key.read_text("utf-8", errors="replace")
        try:
            require_key(key, store.next_key)
        except ConfigError as error:
            logger.warning(f"{error}; making another one")
        else:
            if key.strip() != present.strip():  # it was answered, and the process ended before the file was removed
                return key
    key = new_key()
    write_atomically(store.next_key, key.encode(), durable=True, private=True)
    return key
