"""A daemon that pauses at a limit of its owner: the run continues without it, and it rejoins the run later."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

from support.bundles import Built
from support.in_process_daemon import make_daemon
from support.processes import SECONDS, Broker, Federation, Observer, Processes

from edge_runtime.resources.governor import Limits, Readings
from fedfmsl.protocol.messages import Ack, Activity, DeviceStatus, Health, Round, Stage, Verdict

FREE, GOVERNED = "device-0", "device-1"
LIMIT = 75.0
ROUNDS = (
    "--stage1-rounds",
    "60",
    "--stage2-rounds",
    "2",
    "--round-timeout",
    "5",
)  # a device that pauses during a round costs one timeout


@dataclass
class Heat:
    """A thermometer that the test sets."""

    temperature: float

    def read(self) -> Readings:
        return Readings(temperature=self.temperature)


def is_counted(ack: Ack) -> bool:
    """Whether the server accepted an update of the paused device. It refuses those of earlier rounds as late."""
    return ack.device == GOVERNED and ack.verdict is Verdict.ACCEPTED


def test_a_hot_device_pauses_the_run_continues_and_the_cool_device_rejoins(
    vit: Built, broker: Broker, photos: dict[str, Path], tmp_path: Path
) -> None:
    heat = Heat(90.0)
    both = {name: photos[name] for name in (FREE, GOVERNED)}
    with Processes(tmp_path / "logs") as processes, Observer(broker, "hot") as observer:
        federation = Federation("hot", broker, vit.bundle.root, both, tmp_path, processes)
        daemon = make_daemon(
            vit,
            both[GOVERNED],
            federation.state(GOVERNED),
            GOVERNED,
            broker.url,
            "hot",
            Limits(max_temperature=LIMIT),
            heat.read,
        )
        serving = threading.Thread(target=daemon.connect_and_serve)
        serving.start()
        paused = observer.wait(DeviceStatus, lambda s: s.device == GOVERNED and bool(s.paused), "its pause")
        assert paused.online and paused.paused == f"90.0 °C, above --max-temperature {LIMIT:g}"

        server = federation.start_server(*ROUNDS)
        federation.start_device(FREE, "--bundle", str(vit.bundle.root))
        observer.wait(Round, lambda r: r.stage is Stage.GLOBAL and r.index > 1, "some rounds without it")
        health = observer.wait(Health, lambda h: h.activity is Activity.PAUSED, "its health")
        assert health.temperature == 90.0 and health.paused == paused.paused

        begun = observer.catch_up()
        heat.temperature = 50.0
        observer.wait(DeviceStatus, lambda s: s.device == GOVERNED and not s.paused, "the end of its pause", begun)
        counted = observer.wait(Ack, is_counted, "an update of its own that counts", begun)
        assert counted.round > 3

        begun = observer.catch_up()
        heat.temperature = 76.0
        observer.wait(DeviceStatus, lambda s: s.device == GOVERNED and bool(s.paused), "another pause", begun)
        heat.temperature = 71.0  # below the limit, and not yet far enough below it
        observer.wait(
            Round, lambda r: r.round > counted.round + 2 and r.stage is Stage.GLOBAL, "rounds without it", begun
        )
        heat.temperature = 60.0
        observer.wait(Round, lambda r: r.stage is Stage.FINISHED, "the end")
        serving.join(SECONDS)
        assert not serving.is_alive()
        assert server.wait().code == 0
    rounds = federation.rounds()
    assert not any(line["missing"] for line in rounds[:3]), "a round waited for a paused device"
    took_part = [GOVERNED in line["updates"] for line in rounds]
    assert not any(took_part[:3]) and any(took_part)
    assert daemon.device.store.mixture.is_file()
