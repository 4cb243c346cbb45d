"""A server that is killed in the middle of a round resumes with the same command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.processes import Broker, Federation, Observer, Processes, run_module

from fedfmsl.protocol.messages import Ack, Globals, Round, ServerStatus, Stage, Verdict
from fedfmsl.protocol.tensors import unpack
from trainer_server.storage.run_store import RunStore

SUMS = ("--head", "class-means", "--secure", "--min-class-count", "2", "--min-holders", "3")
ROUNDS = ("--stage1-rounds", "2", "--stage2-rounds", "2", "--audit", *SUMS)
CLOSED = 29
SECURE = (Stage.KEYS, Stage.SHARES, Stage.HOLDERS, Stage.UNMASK, Stage.STATISTICS)


def finish(federation: Federation, observer: Observer) -> bytes:
    """The bytes of the last global expert, after every device has exited with 0."""
    last = observer.wait(Round, lambda r: r.stage is Stage.FINISHED, "the end")
    codes = {name: process.wait().code for name, process in federation.devices.items()}
    assert set(codes.values()) == {0}, codes
    _, tensors = unpack(observer.blobs[last.expert], Globals)
    return b"".join(tensor.tobytes() for _, tensor in sorted(tensors.items()))


@pytest.fixture(scope="module")
def undisturbed(
    broker: Broker, bundle: Path, photos: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> bytes:
    folder = tmp_path_factory.mktemp("undisturbed")
    with Processes(folder / "logs") as processes, Observer(broker, "undisturbed") as observer:
        federation = Federation("undisturbed", broker, bundle, photos, folder, processes)
        federation.start_server(*ROUNDS)
        for name in photos:
            federation.start_device(name, "--bundle", str(bundle))
        return finish(federation, observer)


def test_a_killed_server_resumes_the_round_with_the_acknowledged_updates(
    broker: Broker, bundle: Path, photos: dict[str, Path], tmp_path: Path, undisturbed: bytes
) -> None:
    slow = "device-2"
    with Processes(tmp_path / "logs") as processes, Observer(broker, "killed") as observer:
        federation = Federation("killed", broker, bundle, photos, tmp_path, processes)
        server = federation.start_server(*ROUNDS)
        for name in photos:
            federation.start_device(name, "--bundle", str(bundle))
        for stage in (*SECURE, Stage.GLOBAL, Stage.PERSONAL):
            killed = observer.wait(Round, lambda r, stage=stage: r.stage is stage, stage.value)
            federation.devices[slow].pause()  # so that the round stays open
            for name in set(photos) - {slow}:
                key = (name, killed.round)
                observer.wait(Ack, lambda a, key=key: (a.device, a.round) == key, f"{name}'s ack")
            server.kill()
            since = len(observer.seen)
            server = federation.start_server(*ROUNDS)
            again = observer.wait(Round, lambda r: True, "the round, announced again", since)
            assert again == killed
            assert sorted(RunStore(federation.server_folder).pending_updates()) == sorted(set(photos) - {slow})
            federation.devices[slow].resume()
        assert finish(federation, observer) == undisturbed
        assert server.wait().code == 0
    acks = [
        (ack.round, ack.device) for ack in observer.seen if isinstance(ack, Ack) and ack.verdict is Verdict.ACCEPTED
    ]
    assert len(acks) == len(set(acks)) == CLOSED * len(photos)
    assert not any(closed["missing"] or closed["repeated"] for closed in federation.rounds())

    out = ("--out", str(federation.server_folder))
    replayed = run_module("trainer_server", "replay", *out)
    assert (replayed.code, replayed.stderr) == (0, "")
    assert f"{CLOSED + 1} announced rounds replayed; the {CLOSED} closed ones equal" in replayed.stdout
    status = json.loads(run_module("trainer_server", "status", *out, "--json").stdout)
    assert (status["ended"], status["closed_rounds"], status["repeated"]) == ("finished", CLOSED, [])
    adapter = run_module("trainer_server", "export", *out, "--to", str(tmp_path / "adapter"))
    assert adapter.code == 0
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "adapter" / file).read_bytes() == (
            federation.server_folder / "global_expert" / file
        ).read_bytes()
    listed = run_module("trainer_server", "rounds", *out, "--json").stdout.splitlines()
    assert [json.loads(line)["round"]["round"] for line in listed] == list(range(1, CLOSED + 1))
    ended = run_module("trainer_server", "resume", *out, "--broker", broker.url)
    assert (ended.code, ended.stdout.splitlines()[-1]) == (0, "run finished")
    assert "run 'killed' has finished; announcing it again" in ended.stdout


@pytest.mark.parametrize("kind", ["amqtt", pytest.param("mosquitto", marks=pytest.mark.needs("mosquitto"))])
def test_a_second_server_of_another_folder_does_not_take_a_run_over(
    bundle: Path, photos: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    with Processes(tmp_path / "logs") as processes:
        broker = processes.start_broker(kind)
        with Observer(broker, "duplicate") as observer:
            older = Federation("duplicate", broker, bundle, photos, tmp_path / "older", processes).start_server()
            observer.wait(ServerStatus, lambda s: s.online, "the first server")
            newer = Federation("duplicate", broker, bundle, photos, tmp_path / "newer", processes).start_server()
            newer.wait().assert_error(8, "run 'duplicate' exists already", "its server is online", "purge --run")
            assert older.running
