"""The daemon renews its certificate by itself, at the authority of devices.provision serve."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from support.processes import free_port

from devices.provisioning.authority import CA_DAYS, IDENTITY_DAYS, revoked_serials, serials_of
from devices.provisioning.authority_server import serve
from devices.provisioning.enrollment import Enrollment
from devices.provisioning.fleet import Fleet
from edge_runtime.daemon import renewal
from edge_runtime.daemon.renewal import Renewal, due
from edge_runtime.store.identity_store import IdentityStore
from fedfmsl.transport.enrollment import first_request, new_key
from fedfmsl.transport.identity import pem_blocks, read_identity
from fedfmsl.transport.link import Link

DAY = 86400.0
AGE = timedelta(days=IDENTITY_DAYS * 3 // 4)  # of the certificate: less than a third of its life is left
NOW = datetime.now(timezone.utc)


@pytest.fixture
def enrollment(tmp_path: Path) -> Iterator[Enrollment]:
    before = os.umask(0o022)
    fleet = Fleet(tmp_path / "pki", lambda line: None)
    settings = fleet.settings(["localhost"], "orchard", None)
    fleet.create(["localhost"], tmp_path / "pki", False, settings)
    fleet.store_settings(settings)
    yield Enrollment(fleet)
    os.umask(before)


def enrolled(enrollment: Enrollment, path: Path, age: timedelta = AGE) -> Path:
    """The identity file of a device that was enrolled so long ago."""
    key, day = new_key(), timedelta(days=1)
    request = first_request(key, enrollment.make_token("kitchen", day, NOW - age))
    path.write_text(key + enrollment.answer(request.encode(), NOW - age)[1])
    path.chmod(0o600)
    return path


@pytest.fixture
def configured(enrollment: Enrollment, tmp_path: Path) -> Path:
    return enrolled(enrollment, tmp_path / "kitchen.toml")


@pytest.fixture
def store(configured: Path, tmp_path: Path) -> IdentityStore:
    found = IdentityStore(tmp_path / "state")
    assert found.adopt(configured) == found.path
    return found


@pytest.fixture
def address(enrollment: Enrollment) -> Iterator[str]:
    address = f"127.0.0.1:{free_port()}"
    with serve(enrollment, address, lambda line: None):
        yield address


def key_in(path: Path) -> str:
    return next(block for kind, block in pem_blocks(path.read_text()) if kind.endswith("PRIVATE KEY"))


def test_a_certificate_of_which_a_third_is_left_is_renewed_with_a_new_key(
    enrollment: Enrollment, configured: Path, store: IdentityStore, address: str, tmp_path: Path
) -> None:
    used: list[Path] = []
    reasons: list[str] = []
    ours = Renewal(store, address, used.append, reasons.append)
    before, now = read_identity(store.path), NOW.timestamp()
    assert ours.step(due(before) - DAY) == renewal.CHECK_SECONDS
    assert ours.step(due(before) - 5.0) == pytest.approx(5.0)
    assert not used
    ours.step(now)
    after = read_identity(store.path)
    assert reasons == [""]
    assert used == [store.path] and store.path.stat().st_mode & 0o777 == 0o600 and not store.next_key.exists()
    assert after.name == "kitchen" and after.valid and after.valid[1] > NOW + timedelta(days=IDENTITY_DAYS - 2)
    assert after.authorities == before.authorities and key_in(store.path) != key_in(configured)
    assert ours.step(now) == renewal.CHECK_SECONDS and used == [store.path]
    assert store.newest(configured) == store.path
    link = Link("mqtts://localhost", "kitchen", identity=configured)
    link.renew_identity(store.path)
    assert link.own_until == after.valid[1].timestamp()
    later = enrolled_again(enrollment, tmp_path)  # the operator has replaced the identity: its file counts again
    assert store.newest(later) == later
    store.next_key.write_text(new_key())  # of an unanswered request of the earlier identity
    assert store.adopt(later) == store.path and key_in(store.path) == key_in(later)
    assert not store.next_key.exists()


def enrolled_again(enrollment: Enrollment, tmp_path: Path) -> Path:
    issued = serials_of(enrollment.fleet.issued("kitchen").read_bytes())
    enrollment.fleet.revoke(["kitchen"])
    revoked = revoked_serials((enrollment.fleet.folder / "broker" / "revoked.crl").read_bytes())
    assert len(issued) == 2 and set(issued) == set(revoked)  # for broker and HTTPS
    return enrolled(enrollment, tmp_path / "again.toml", timedelta(days=-1))


def test_the_identity_that_was_issued_last_counts_also_if_both_end_with_the_ca(
    enrollment: Enrollment, tmp_path: Path
) -> None:
    store = IdentityStore(tmp_path / "state")
    store.adopt(enrolled(enrollment, tmp_path / "first.toml", -timedelta(days=CA_DAYS - 300)))
    enrollment.fleet.revoke(["kitchen"])
    later = enrolled(enrollment, tmp_path / "later.toml", -timedelta(days=CA_DAYS - 200))
    ends = [valid[1] for path in (store.path, later) if (valid := read_identity(path).valid)]
    assert len(ends) == 2 and ends[0] == ends[1]
    assert store.newest(later) == later


def test_a_revoked_device_is_not_renewed_and_tries_again_later(
    enrollment: Enrollment, store: IdentityStore, address: str, caplog: pytest.LogCaptureFixture
) -> None:
    enrollment.fleet.revoke(["kitchen"])
    ours, before = Renewal(store, address, lambda path: None, lambda reason: None), store.path.read_bytes()
    delays = [ours.step(NOW.timestamp()) for _ in range(8)]
    assert delays[0] < 1000 and renewal.RETRY.longest <= delays[-1] <= 1.5 * renewal.RETRY.longest
    assert "kitchen has no valid certificate: it was revoked" in caplog.messages[0]
    assert store.path.read_bytes() == before and not enrollment.fleet.issued("kitchen").exists()


def test_an_authority_that_does_not_answer_is_named(
    store: IdentityStore, caplog: pytest.LogCaptureFixture, enrollment: Enrollment
) -> None:
    address = f"127.0.0.1:{free_port()}"
    reasons: list[str] = []
    ours = Renewal(store, address, lambda path: None, reasons.append)
    ours.step(NOW.timestamp())
    assert f"no answer from the authority at {address}" in reasons[0]
    assert f"the certificate is not renewed: no answer from the authority at {address}" in caplog.text
    unanswered = store.next_key.read_text()
    with serve(enrollment, address, lambda line: None):
        ours.step(NOW.timestamp())
    assert reasons[1] == ""
    assert key_in(store.path) == unanswered.strip()
    assert len(serials_of(enrollment.fleet.issued("kitchen").read_bytes())) == 2


def test_a_crash_after_the_answer_leaves_no_key_that_is_used_again(
    enrollment: Enrollment, store: IdentityStore, address: str
) -> None:
    present = key_in(store.path)
    store.next_key.write_text(present + "\n")  # the process ended before it was removed
    Renewal(store, address, lambda path: None, lambda reason: None).step(NOW.timestamp())
    assert key_in(store.path) != present


def test_a_damaged_key_is_named_and_replaced(
    store: IdentityStore, address: str, caplog: pytest.LogCaptureFixture
) -> None:
    store.next_key.write_text(new_key()[:100])
    reasons: list[str] = []
    Renewal(store, address, lambda path: None, reasons.append).step(NOW.timestamp())
    assert reasons == [""] and not store.next_key.exists()
    assert f"{store.next_key}: this is no private key in PEM" in caplog.messages[0]


def test_the_thread_renews_at_its_start(store: IdentityStore, address: str) -> None:
    renewed = threading.Event()
    with Renewal(store, address, lambda path: renewed.set(), lambda reason: None):
        assert renewed.wait(60.0)


def test_an_identity_without_a_key_or_of_another_ca_is_left_as_it_is(
    enrollment: Enrollment, configured: Path, store: IdentityStore, tmp_path: Path
) -> None:
    only_ca = enrollment.fleet.folder / "ca.crt"
    assert store.newest(only_ca) == only_ca and store.adopt(only_ca) == only_ca
    other = Fleet(tmp_path / "other", lambda line: None)
    settings = other.settings(["localhost"], "orchard", None)
    other.create(["localhost"], tmp_path / "other", False, settings)
    other.store_settings(settings)
    foreign = enrolled(Enrollment(other), tmp_path / "foreign.toml", timedelta(days=800))
    assert store.newest(foreign) == foreign  # though the stored one is valid for longer
    store.path.write_text("damaged")
    assert store.newest(configured) == configured
