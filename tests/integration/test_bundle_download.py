"""A device without a bundle downloads it from the server over HTTP(S): resumed after a cut, refused if altered."""

from __future__ import annotations

import logging
import math
import queue
import shutil
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.processes import SECONDS, Broker, Ended, Process, Processes, free_port, run_module, wait_until
from support.provisioned_fleet import write_identity

from devices.provisioning.authority import CLIENT, SERVER, make_authority
from edge_runtime.daemon.download import fetch_bundle, wait_for_server
from edge_runtime.daemon.prepare import bundle_of
from edge_runtime.store import DeviceStore
from fedfmsl.errors import BundleError
from fedfmsl.protocol.bundle import MANIFEST, Bundle, file_sha256
from fedfmsl.protocol.messages import ServerStatus, encode
from fedfmsl.protocol.topics import Topics
from fedfmsl.transport.link import Link
from trainer_server.service.bundle_http import BundleServer

WEIGHTS = "backbone.weights"


@pytest.fixture
def served(bundle: Path, tmp_path: Path) -> Iterator[tuple[ServerStatus, Path]]:
    """The status that the server announces, and the folder that it serves."""
    root = shutil.copytree(bundle, tmp_path / "served")
    server = BundleServer(root, f"127.0.0.1:{free_port()}")
    yield (
        ServerStatus(online=True, run="fetch", session="1", bundle=Bundle.load(root).sha256, bundle_url=server.url),
        root,
    )
    server.close()


def test_a_server_whose_address_is_not_this_machines_listens_on_all(bundle: Path, tmp_path: Path) -> None:
    """As in a container, or behind address translation: clients reach it under another address than its own."""
    port = free_port()
    server = BundleServer(bundle, f"192.0.2.1:{port}", insecure=True)
    assert server.url == f"http://192.0.2.1:{port}/bundle"
    status = ServerStatus(
        online=True,
        run="fetch",
        session="1",
        bundle=Bundle.load(bundle).sha256,
        bundle_url=server.url.replace("192.0.2.1", "127.0.0.1"),
    )
    fetch_bundle(status, tmp_path / "fetched").verify()
    server.close()


def test_a_full_disk_is_named_with_what_the_bundle_needs(served: tuple[ServerStatus, Path], tmp_path: Path) -> None:
    status, root = served
    folder = tmp_path / "device" / status.bundle
    folder.mkdir(parents=True)
    (folder / f"{WEIGHTS}.part").symlink_to("/dev/full")
    needs = f"needs {(root / WEIGHTS).stat().st_size / 1e6:.1f} MB more for {WEIGHTS}; free some disk space"
    with pytest.raises(BundleError, match=needs):
        fetch_bundle(status, tmp_path / "device")


def test_the_bundle_is_downloaded_once(
    served: tuple[ServerStatus, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    status, _ = served
    first = fetch_bundle(status, tmp_path / "device")
    first.verify()
    assert first.sha256 == status.bundle
    assert caplog.text.count("fetching") == len(first.manifest.files) + 1
    caplog.clear()
    assert fetch_bundle(status, tmp_path / "device").root == first.root
    assert "fetching" not in caplog.text


@pytest.mark.parametrize("share", [0.3, 1.0], ids=["cut off in the middle", "cut off before it was renamed"])
def test_a_download_that_was_cut_off_is_resumed(
    served: tuple[ServerStatus, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, share: float
) -> None:
    caplog.set_level(logging.INFO)
    status, root = served
    whole = (root / WEIGHTS).read_bytes()
    have = int(share * len(whole))
    target = tmp_path / "device" / status.bundle
    target.mkdir(parents=True)
    (target / f"{WEIGHTS}.part").write_bytes(whole[:have])
    fetch_bundle(status, tmp_path / "device").verify()
    assert f"fetching {WEIGHTS} from byte {have}" in caplog.text
    assert not (target / f"{WEIGHTS}.part").exists()


@pytest.mark.parametrize("name", [WEIGHTS, MANIFEST])
def test_an_altered_file_is_refused_and_deleted(served: tuple[ServerStatus, Path], tmp_path: Path, name: str) -> None:
    status, root = served
    good = (root / name).read_bytes()
    (root / name).write_bytes(good[:-2] + bytes([good[-2] ^ 1]) + good[-1:])
    with pytest.raises(BundleError, match=f"{name} does not have the announced SHA-256"):
        fetch_bundle(status, tmp_path / "device")
    target = tmp_path / "device" / status.bundle
    assert not (target / name).exists()
    assert not (target / f"{name}.part").exists()

    (root / name).write_bytes(good)
    fetch_bundle(status, tmp_path / "device").verify()


def test_a_part_of_another_file_is_deleted(served: tuple[ServerStatus, Path], tmp_path: Path) -> None:
    status, _ = served
    target = tmp_path / "device" / status.bundle
    target.mkdir(parents=True)
    (target / f"{WEIGHTS}.part").write_bytes(b"something else")
    with pytest.raises(BundleError, match="are deleted"):
        fetch_bundle(status, tmp_path / "device")
    fetch_bundle(status, tmp_path / "device").verify()


def test_an_unreachable_server_is_named(bundle: Path, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}/bundle"
    status = ServerStatus(online=True, run="fetch", session="1", bundle=Bundle.load(bundle).sha256, bundle_url=url)
    with pytest.raises(BundleError, match=f"cannot fetch {url}/{MANIFEST}.*start again to resume"):
        fetch_bundle(status, tmp_path / "device", retry_delays=(0.0, 0.0))


def test_a_proxy_of_the_environment_that_is_in_the_way_is_named(
    served: tuple[ServerStatus, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, _ = served
    monkeypatch.setenv("http_proxy", f"http://me:secret@127.0.0.1:{free_port()}")
    with pytest.raises(BundleError, match=r"through the proxy http://127.* of http_proxy; .*no_proxy=127") as caught:
        fetch_bundle(status, tmp_path / "device", retry_delays=())
    assert "secret" not in str(caught.value)
    monkeypatch.setenv("no_proxy", "127.0.0.1")  # the remedy
    fetch_bundle(status, tmp_path / "device", retry_delays=()).verify()


def test_a_file_that_is_missing_on_the_server_is_named(served: tuple[ServerStatus, Path], tmp_path: Path) -> None:
    status, root = served
    (root / WEIGHTS).unlink()
    with pytest.raises(BundleError, match=f"cannot fetch .*{WEIGHTS}: HTTP 404"):
        fetch_bundle(status, tmp_path / "device")


def test_an_altered_file_of_a_stored_bundle_is_fetched_again(
    served: tuple[ServerStatus, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    status, root = served
    store = DeviceStore(tmp_path / "state")
    path, content = bundle_of(status, store).path(WEIGHTS), (root / WEIGHTS).read_bytes()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    caplog.clear()
    assert bundle_of(status, store).path(WEIGHTS).read_bytes() == content
    assert caplog.text.count("fetching ") == 2 and f"{WEIGHTS} has been altered" in caplog.text
    caplog.clear()
    assert bundle_of(status, store).path(WEIGHTS) == path and caplog.text == ""


@pytest.fixture
def own_broker(tmp_path: Path) -> Iterator[Broker]:
    with Processes(tmp_path / "logs") as processes:
        yield processes.start_broker()


def test_a_device_waits_for_the_server_and_logs_it(own_broker: Broker, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    topics, status = Topics("deserted"), ServerStatus(online=True, run="deserted", session="1")
    device, server = Link(own_broker.url, "device"), Link(own_broker.url, "server")
    device.connect()
    server.connect()
    found: queue.Queue[ServerStatus] = queue.Queue()
    threading.Thread(target=lambda: found.put(wait_for_server(device, topics, report_seconds=0.0)), daemon=True).start()
    server.publish(topics.server_status, b"not a status", retain=True)
    server.publish(topics.server_status, encode(status.model_copy(update={"online": False})))
    wait_until(lambda: "no server of run 'deserted' yet" in caplog.text, "the log message")
    assert found.empty()
    server.publish(topics.server_status, encode(status), retain=True)
    assert found.get(timeout=SECONDS) == status
    device.close()
    server.close()


def get(url: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    request = urllib.request.Request(url, headers={name.replace("_", "-"): value for name, value in headers.items()})
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.status, dict(response.headers), response.read()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), error.read()


def test_the_etag_of_a_file_is_its_sha256(served: tuple[ServerStatus, Path]) -> None:
    status, root = served
    for name in (WEIGHTS, MANIFEST):
        etag = f'"{file_sha256(root / name)}"'
        assert get(f"{status.bundle_url}/{name}")[1]["etag"] == etag
        code, headers, body = get(f"{status.bundle_url}/{name}", If_None_Match=f'"other", {etag}')
        assert (code, headers["etag"], body) == (304, etag, b"")


def test_a_range_is_sent_of_the_same_version_only(served: tuple[ServerStatus, Path]) -> None:
    status, root = served
    url, whole = f"{status.bundle_url}/{WEIGHTS}", (root / WEIGHTS).read_bytes()
    code, _, body = get(url, Range="bytes=100-", If_Range=f'"{file_sha256(root / WEIGHTS)}"')
    assert (code, body) == (206, whole[100:])
    code, _, body = get(url, Range="bytes=100-", If_Range='"another version"')
    assert (code, body) == (200, whole)


@pytest.mark.parametrize("name", ["secret", "../outside", "..%2Foutside", "%2e%2e/outside", "", "/etc/passwd", "sub/x"])
def test_only_files_in_the_manifest_are_served(served: tuple[ServerStatus, Path], name: str) -> None:
    status, root = served
    (root / "secret").write_text("in the folder, but not of the bundle")
    (root.parent / "outside").write_text("not even in the folder")
    assert get(f"{status.bundle_url}/{name}")[0] == 404


def test_at_most_one_byte_more_is_read_than_the_manifest_announces(
    served: tuple[ServerStatus, Path], tmp_path: Path
) -> None:
    status, root = served
    fetched = fetch_bundle(status, tmp_path / "device")
    fetched.path(WEIGHTS).unlink()
    size = (root / WEIGHTS).stat().st_size
    with (root / WEIGHTS).open("ab") as file:
        file.write(bytes(10_000_000))
    blocks: list[None] = []
    with pytest.raises(BundleError, match="are deleted"):
        fetch_bundle(status, tmp_path / "device", block_bytes=1000, heartbeat=lambda: blocks.append(None))
    assert len(blocks) == math.ceil((size + 1) / 1000)


def test_a_download_continues_after_cut_connections(served: tuple[ServerStatus, Path], tmp_path: Path) -> None:
    status, _ = served
    port = int(status.bundle_url.split(":")[2].split("/")[0])
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=cut_after, args=(listener, port, 200_000), daemon=True).start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/bundle"
        cut = status.model_copy(update={"bundle_url": url})
        fetch_bundle(cut, tmp_path / "device", retry_delays=(0.0,)).verify()


def cut_after(listener: socket.socket, port: int, limit: int) -> None:
    """Forwards connections to `port` and cuts each after `limit` bytes."""
    while True:
        try:
            client, _ = listener.accept()
        except OSError:
            return
        with client, socket.create_connection(("127.0.0.1", port)) as server:
            server.sendall(client.recv(65536))
            left = limit
            while left and (data := server.recv(min(left, 65536))):
                client.sendall(data)
                left -= len(data)


def test_over_tls_only_members_of_the_fleet_download_the_bundle(bundle: Path, tmp_path: Path) -> None:
    ours, theirs = make_authority("ours"), make_authority("theirs")
    server = write_identity(tmp_path / "server.pem", ours.issue("server", [SERVER], ["localhost"]), ours)
    device = write_identity(tmp_path / "device.pem", ours.issue("device", [CLIENT]), ours)
    nobody = write_identity(tmp_path / "nobody.pem", None, ours)
    foreign = write_identity(tmp_path / "foreign.pem", theirs.issue("device", [CLIENT]), ours)
    trusting = write_identity(tmp_path / "trusting.pem", ours.issue("device", [CLIENT]), theirs)
    served = BundleServer(bundle, f"localhost:{free_port()}", server)
    try:
        url = served.url
        assert url.startswith("https://")
        status = ServerStatus(online=True, run="tls", session="1", bundle=Bundle.load(bundle).sha256, bundle_url=url)
        fetch_bundle(status, tmp_path / "fetched", device).verify()
        for identity, says in (
            (nobody, "--identity"),
            (foreign, "--identity"),
            (trusting, "not of the identity file's CA"),
        ):
            with pytest.raises(BundleError, match=says):
                fetch_bundle(status, tmp_path / identity.stem, identity, retry_delays=(0.0,))
    finally:
        served.close()


@pytest.fixture(scope="module")
def waiting_server(broker: Broker, bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """The server of run "waiting", which waits for more devices than the tests start."""
    folder = tmp_path_factory.mktemp("waiting")
    with Processes(folder / "logs") as processes:
        yield processes.start_module(
            "server",
            "trainer_server",
            *("start", "--run", "waiting", "--bundle", str(bundle), "--broker", broker.url),
            *("--out", str(folder), "--devices", "9"),
        )


def join_waiting(broker: Broker, photos: Path, state: Path, *arguments: str) -> Ended:
    return run_module(
        "edge_runtime",
        *("run", "--run", "waiting", "--images", str(photos), "--broker", broker.url, "--state", str(state)),
        *arguments,
    )


def test_a_device_with_another_bundle_is_refused(
    waiting_server: Process, broker: Broker, other_bundle: Path, photos: dict[str, Path], tmp_path: Path
) -> None:
    ended = join_waiting(broker, photos["device-0"], tmp_path, "--bundle", str(other_bundle))
    ended.assert_error(8, "run 'waiting' uses another bundle", "tiny-vit", "pass the run's --bundle, or none")
    assert waiting_server.running


def test_a_device_without_a_bundle_is_refused_if_the_server_serves_none(
    waiting_server: Process, broker: Broker, photos: dict[str, Path], tmp_path: Path
) -> None:
    ended = join_waiting(broker, photos["device-0"], tmp_path)
    ended.assert_error(4, "does not serve its bundle", "--serve HOST:PORT", "--bundle")
    assert waiting_server.running
