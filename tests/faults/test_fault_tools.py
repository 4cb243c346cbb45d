"""The tools of fault tests. A tool that does nothing would let every fault test pass."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.brokers import RestartableBroker
from support.fault_records import Records, Row
from support.fault_table import BEGIN, END, markdown, write
from support.hostile_client import publish
from support.kill_point import launcher
from support.machine_faults import Clock, failing_calls, journaled_disk, no_descriptors, small_disk
from support.network_proxy import LOOPBACK, Packets, Proxy
from support.network_space import NetworkSpace
from support.processes import Observer, Processes

from fedfmsl.protocol.messages import ServerStatus, encode
from fedfmsl.transport.link import Link, Received

SECONDS = 10.0


def packet(number: int, qos: int = 1, size: int = 200) -> bytes:
    """A PUBLISH packet whose payload repeats its number."""
    topic = b"\x00\x01t"
    body = topic + (number.to_bytes(2, "big") if qos else b"") + bytes([number]) * size
    length, left = b"", len(body)
    while left > 0x7F:
        length, left = length + bytes([left & 0x7F | 0x80]), left >> 7
    return bytes([0x30 | qos << 1]) + length + bytes([left]) + body


PING = b"\xc0\x00"


@contextmanager
def connection(proxy: Proxy, listener: socket.socket) -> Iterator[tuple[socket.socket, socket.socket]]:
    """The sockets of a client and a broker with the proxy between them."""
    with socket.create_connection((LOOPBACK, proxy.port), SECONDS) as client:
        broker, _ = listener.accept()
        broker.settimeout(SECONDS)
        with broker:
            yield client, broker


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server((LOOPBACK, 0)) as server:
        server.settimeout(SECONDS)
        yield server


@pytest.fixture
def proxy(listener: socket.socket) -> Iterator[Proxy]:
    with Proxy(listener.getsockname()[1], seed=1) as made:
        yield made


def receive(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        data += sock.recv(size - len(data)) or pytest.fail(f"closed after {len(data)} of {size} bytes")
    return data


def numbers(data: bytes) -> list[int]:
    """The numbers of the PUBLISH packets in `data`; 0 for a PINGREQ."""
    return [0 if each == PING else each[-1] for each in Packets().feed(data)]


def test_packets_are_found_in_a_stream_of_any_pieces() -> None:
    stream = [packet(1), PING, packet(2, size=20_000), packet(3, qos=0, size=1)]
    for step in (1, 2, 3, 7, 1000):
        splitter, data = Packets(), b"".join(stream)
        assert [p for i in range(0, len(data), step) for p in splitter.feed(data[i : i + step])] == stream


def test_without_a_fault_every_byte_passes_both_ways(proxy: Proxy, listener: socket.socket) -> None:
    data = b"".join(packet(number) for number in range(100)) + PING
    with connection(proxy, listener) as (client, broker):
        client.sendall(data)
        assert receive(broker, len(data)) == data
        broker.sendall(bytes(100_000))
        assert receive(client, 100_000) == bytes(100_000)
        client.close()
        assert broker.recv(1) == b""


def test_a_repeated_publish_has_the_same_packet_identifier(proxy: Proxy, listener: socket.socket) -> None:
    proxy.repeat = 1.0
    with connection(proxy, listener) as (client, broker):
        client.sendall(packet(7) + packet(8, qos=0) + PING)
        expected = [packet(7), bytes([packet(7)[0] | 0x08]) + packet(7)[1:], packet(8, qos=0), PING]
        assert receive(broker, sum(map(len, expected))) == b"".join(expected)
    assert proxy.repeated == 1


def test_a_share_of_publishes_is_repeated(proxy: Proxy, listener: socket.socket) -> None:
    proxy.repeat = 0.05
    with connection(proxy, listener) as (client, broker):
        client.sendall(b"".join(packet(number % 256) for number in range(1000)) + PING)
        data = receive(broker, 1000 * len(packet(0)) + len(PING))
        assert 20 < proxy.repeated < 100
        data += receive(broker, proxy.repeated * len(packet(0)))
    assert len(numbers(data)) == 1001 + proxy.repeated


def test_neighbouring_publishes_are_swapped_and_none_is_lost(proxy: Proxy, listener: socket.socket) -> None:
    proxy.swap = 1.0
    with connection(proxy, listener) as (client, broker):
        sent = packet(1) + packet(2) + packet(3) + PING + packet(4) + packet(5) + packet(6)
        client.sendall(sent)
        assert numbers(receive(broker, len(sent))) == [2, 1, 3, 0, 5, 4, 6]
    assert proxy.swapped == 2


def test_latency_delays_each_direction_and_keeps_the_bandwidth(proxy: Proxy, listener: socket.socket) -> None:
    proxy.latency = 0.3
    with connection(proxy, listener) as (client, broker):
        started = time.monotonic()
        for number in range(1, 6):
            client.sendall(packet(number))
        assert numbers(receive(broker, 5 * len(packet(0)))) == [1, 2, 3, 4, 5]
        broker.sendall(b"x")
        receive(client, 1)
        assert 0.6 <= time.monotonic() - started < 5 * 0.6  # packets are delayed in parallel


def test_a_cut_closes_both_sides_and_a_new_connection_works(proxy: Proxy, listener: socket.socket) -> None:
    with connection(proxy, listener) as (client, broker):
        client.sendall(PING)
        receive(broker, len(PING))
        assert proxy.cut() == 1
        for side in (client, broker):
            assert gone(side)
    with connection(proxy, listener) as (client, broker):
        client.sendall(PING)
        assert receive(broker, len(PING)) == PING


def gone(side: socket.socket) -> bool:
    try:
        return side.recv(1) == b""
    except ConnectionResetError:
        return True


def test_half_open_connections_pass_nothing_and_are_not_closed(proxy: Proxy, listener: socket.socket) -> None:
    with connection(proxy, listener) as (client, broker):
        client.sendall(PING)
        receive(broker, len(PING))
        assert proxy.half_open() == 1
        client.sendall(PING)
        broker.sendall(PING)
        for side in (client, broker):
            side.settimeout(0.3)
            with pytest.raises(TimeoutError):
                side.recv(1)
        with connection(proxy, listener) as (other, other_broker):  # a new connection works
            other.sendall(PING)
            assert receive(other_broker, len(PING)) == PING
        client.close()
        with pytest.raises(TimeoutError):  # the broker does not notice that either
            broker.recv(1)


def test_refused_connections_are_not_answered(proxy: Proxy, listener: socket.socket) -> None:
    with connection(proxy, listener) as (client, broker):
        proxy.refuse()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((LOOPBACK, proxy.port), SECONDS)
        client.sendall(PING)
        assert receive(broker, len(PING)) == PING
    proxy.admit()
    with connection(proxy, listener) as (client, broker):
        client.sendall(PING)
        assert receive(broker, len(PING)) == PING


VICTIM = """
from pathlib import Path
import sys

def write(path, text):
    Path(path).write_text(text)

class Writer:
    def again(self, path, text):
        write(path, text)

def main(path):
    for text in ("one", "two", "three"):
        Writer().again(path, text)
"""
MAIN = "import sys\nfrom victim import main\nmain(sys.argv[1])\n"


@pytest.mark.parametrize(
    ("point", "when", "call", "written"),
    [
        ("victim:write", "before", 1, None),
        ("victim:write", "before", 3, "two"),
        ("victim:Writer.again", "after", 2, "two"),
        ("victim:Writer.again", "after", 3, "three"),
    ],
)
def test_a_process_is_killed_at_the_chosen_call(
    tmp_path: Path, point: str, when: str, call: int, written: str | None
) -> None:
    (tmp_path / "victim.py").write_text(VICTIM)
    (tmp_path / "program.py").write_text(MAIN)
    command = [sys.executable, *launcher(point, when, call), "program", "out"]
    done = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True)
    assert done.returncode == -9, done.stderr
    out = tmp_path / "out"
    assert (out.read_text() if out.exists() else None) == written


def test_a_call_that_never_happens_kills_no_process(tmp_path: Path) -> None:
    (tmp_path / "victim.py").write_text(VICTIM)
    (tmp_path / "program.py").write_text(MAIN)
    command = [sys.executable, *launcher("victim:write", "before", 4), "program", "out"]
    assert subprocess.run(command, cwd=tmp_path, check=False).returncode == 0


def test_calls_before_a_process_is_armed_do_not_count(tmp_path: Path) -> None:
    (tmp_path / "victim.py").write_text(VICTIM)
    (tmp_path / "program.py").write_text(MAIN)
    command = [sys.executable, *launcher("victim:write", "before", 1, tmp_path / "out"), "program", "out"]
    assert subprocess.run(command, cwd=tmp_path, check=False).returncode == -9
    assert (tmp_path / "out").read_text() == "one"


def test_a_point_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "victim.py").write_text(VICTIM)
    (tmp_path / "program.py").write_text(MAIN)
    command = [sys.executable, *launcher("victim:erase", "before"), "program", "out"]
    done = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert "erase" in done.stderr


def test_a_full_disk_refuses_writes_until_it_is_freed(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 2) as disk:
        (disk.root / "before").write_bytes(bytes(10_000))
        disk.fill()
        with pytest.raises(OSError, match="No space left"):
            (disk.root / "more").write_bytes(bytes(10_000))
        disk.free()
        (disk.root / "more").write_bytes(bytes(10_000))


CLOCKS = """
import sys, time
for line in sys.stdin:
    print(time.time(), time.monotonic(), flush=True)
"""


def test_the_wall_clock_of_a_running_process_jumps_and_its_monotonic_clock_does_not(tmp_path: Path) -> None:
    clock = Clock(tmp_path)
    with subprocess.Popen(
        [sys.executable, "-c", CLOCKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=clock.environment
    ) as process:
        assert process.stdin
        assert process.stdout

        def read_clocks() -> tuple[float, float]:
            process.stdin.write("\n")
            process.stdin.flush()
            wall, monotonic = map(float, process.stdout.readline().split())
            return wall - time.time(), monotonic - time.monotonic()

        for jump in (0, 3600, -3600, 0):
            clock.jump(jump)
            wall, monotonic = read_clocks()
            assert abs(wall - jump) < 2
            assert abs(monotonic) < 2
        process.stdin.close()


@pytest.mark.needs("mosquitto")
@pytest.mark.parametrize(("persistent", "end"), [(False, "stop"), (True, "stop"), (True, "kill")])
def test_only_a_persistent_mosquitto_keeps_messages_over_a_restart(
    tmp_path: Path, processes: Processes, persistent: bool, end: str
) -> None:
    broker = RestartableBroker(processes, tmp_path, "mosquitto", persistent)
    assert publish(broker.url, [("kept", b"first"), ("kept", b"second")], retain=True)
    time.sleep(1.5 if end == "kill" else 0)  # it checks once a second whether to save
    getattr(broker, end)()
    broker.start()
    link = Link(broker.url, "reader")
    link.connect()
    link.subscribe("kept")
    events = [link.next_event(0.5) for _ in range(3)]
    link.close()
    assert (Received("kept", b"second", retained=True) in events) == persistent


def test_messages_of_the_hostile_client_arrive(tmp_path: Path, kind: str, processes: Processes) -> None:
    broker = RestartableBroker(processes, tmp_path, kind)
    status = ServerStatus(online=True, run="x", session="hostile")
    with Observer(broker, "x") as observer:
        threading.Timer(0.3, publish, (broker.url, [("fedfmsl/x/server/status", encode(status))])).start()
        assert observer.wait(ServerStatus, lambda s: True, "the hostile client") == status


def test_the_table_sums_the_tries_of_this_commit_and_keeps_the_text_around_it(tmp_path: Path) -> None:
    path, folder, counts = tmp_path / "reliability.md", tmp_path / "records", {"lost": 0, "recomputed": 7}
    every = {"double": 0, "repeated": 0, "compared": 7, **counts}
    for commit, seconds in (("abc", [1.0, 3.0, 2.5]), ("abc", [2.0]), ("older", [9.0])):
        Records(commit, folder).append("test_cut", Row("cut", seconds, every), "", None)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "server.out").write_text("its last words")
    Records("abc", folder).append("test_cut::seed", Row("cut", [4.0]), "it went wrong", tmp_path / "logs")
    path.write_text(f"Before.\n{BEGIN}\nold\n{END}\nAfter.\n")
    write(path, markdown(Records("abc", folder), "brokers"))
    text = path.read_text()
    assert "| cut | 6 | 1 | 0 | 0 | 0 | 14 | 14 | 2.5 | 4.0 |" in text
    assert "test_cut::seed: it went wrong" in text
    assert (folder / "abc-logs" / "seed" / "server.out").read_text() == "its last words"
    assert "old\n" not in text
    assert text.startswith("Before.\n")
    assert text.endswith("\nAfter.\n")


def test_after_a_power_loss_a_disk_has_what_was_synced_and_nothing_else(tmp_path: Path) -> None:
    with journaled_disk(tmp_path / "disk", 8) as disk:
        for name in ("synced", "unsynced"):
            with (disk.root / name).open("w") as file:
                file.write("kept")
                if name == "synced":
                    file.flush()
                    os.fsync(file.fileno())
                    file.write(" and more")
        disk.fail()
        with pytest.raises(OSError, match="Input/output error"):
            (disk.root / "after").write_text("")
        disk.repair()
        assert (disk.root / "synced").read_text() == "kept"
        assert not (disk.root / "unsynced").exists() or not (disk.root / "unsynced").read_text()


WRITER = """
import os, sys
for line in sys.stdin:
    try:
        with open(sys.argv[1], "w") as file:
            os.fsync(file.fileno())
        print("written", flush=True)
    except OSError as error:
        print(error.strerror, flush=True)
"""


@pytest.mark.needs("strace")
def test_files_of_a_running_process_fail_for_a_while(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path / "file")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin
        assert process.stdout

        def attempt() -> str:
            process.stdin.write("\n")
            process.stdin.flush()
            return str(process.stdout.readline().strip())

        assert attempt() == "written"
        with no_descriptors(process.pid):
            assert attempt() == "Too many open files"
        with failing_calls(process.pid, "fsync", "EIO"):
            assert attempt() == "Input/output error"
        assert attempt() == "written"
        process.stdin.close()


PACKETS = 100
RECEIVER = """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
    receiver.bind((sys.argv[1], 0))
    print(receiver.getsockname()[1], flush=True)
    while True:
        count = 0
        while receiver.recv(1000) != b"end":
            count += 1
        print(count, flush=True)
"""


@pytest.mark.needs("ip", "tc", "iptables")
def test_a_network_space_loses_packets_and_is_slow() -> None:
    with NetworkSpace() as network, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        receiver = subprocess.Popen(
            [*network.command, sys.executable, "-c", RECEIVER, network.address], stdout=subprocess.PIPE, text=True
        )
        assert receiver.stdout
        address = (network.address, int(receiver.stdout.readline()))
        counts = []
        for worsen in (lambda: None, lambda: network.lose(0.5), lambda: network.limit(100)):
            worsen()
            for _ in range(PACKETS):
                sender.sendto(bytes(500), address)
            network.repair()
            sender.sendto(b"end", address)
            counts.append(int(receiver.stdout.readline()))
        receiver.kill()
        receiver.wait()
        receiver.stdout.close()
    assert counts[0] == PACKETS
    assert 0.3 * PACKETS < counts[1] < 0.7 * PACKETS
    assert counts[2] < 0.5 * PACKETS
