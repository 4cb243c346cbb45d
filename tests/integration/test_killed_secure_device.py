"""A real device that is killed between the steps of secure aggregation, on a real broker. The unit tests kill it at
every write of every step."""

from __future__ import annotations

import signal
from pathlib import Path

from support.kill_point import launcher
from support.processes import Broker, Federation, Observer, Processes

from fedfmsl.protocol.messages import Round, Stage

RECORD = "edge_runtime.store.secure_store:SecureStore.write"
VICTIM, OTHERS = "device-0", ("device-1", "device-2")
STEPS = {"its masked update": 3, "the shares that it opens": 2}  # call of RECORD; a masked update is recorded again


def test_a_device_killed_after_it_has_recorded_what_it_will_send_is_in_the_same_sum(
    broker: Broker, bundle: Path, photos: dict[str, Path], tmp_path: Path
) -> None:
    """A sum with wrong masks would have a norm above --max-norm, and the run would go on without it."""
    with Processes(tmp_path / "logs") as processes, Observer(broker, "secure") as observer:
        federation = Federation("secure", broker, bundle, photos, tmp_path, processes)
        federation.start_server("--secure", "--stage1-rounds", "1", "--stage2-rounds", "1", "--head-sums", "none")
        for name in OTHERS:
            federation.start_device(name, "--bundle", str(bundle))
        for number, (step, call) in enumerate(STEPS.items()):
            federation.start_device(
                VICTIM, "--bundle", str(bundle), again=number > 0, launcher=launcher(RECORD, "after", call)
            )
            ended = federation.devices[VICTIM].wait()
            assert ended.code == -signal.SIGKILL, (step, ended.stdout[-1000:], ended.stderr[-1000:])
        federation.start_device(VICTIM, "--bundle", str(bundle), again=True)
        observer.wait(Round, lambda r: r.stage is Stage.EVALUATE, "the end of stage 2")
        rounds = federation.rounds()
    assert [line["round"]["stage"] for line in rounds] == [
        *("keys", "shares", "global", "unmask"),
        *("keys", "shares", "personal", "unmask"),
    ]
    assert all(sorted(line["updates"]) == sorted(photos) and not line["repeated"] for line in rounds)
    assert "no secure aggregation" not in (federation.server_folder / "notes.log").read_text()
