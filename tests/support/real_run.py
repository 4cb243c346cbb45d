"""A run with three real devices (ONNX Runtime, a tiny ViT, int8 updates with error feedback), one of which fails."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedfmsl.protocol.messages import Ack, Verdict
from support.brokers import RestartableBroker
from support.fault_records import Row
from support.processes import RUN_SECONDS, Federation, Observer, Process, Processes
from support.run_oracle import Reference, examine, reference
from support.simulation import ROUND_TIMEOUT

RUN = "real"
VICTIM, OTHERS = "device-0", ("device-1", "device-2")


@dataclass(frozen=True)
class Shape:
    """Rounds of each stage, and whether the server sees sums only (--secure)."""

    stage1: int
    stage2: int
    secure: bool = False


def settings_of(shape: Shape) -> list[str]:
    """Of the server. No round closes without an update of the victim, so every round can be compared."""
    rounds = ["--stage1-rounds", str(shape.stage1), "--stage2-rounds", str(shape.stage2), "--audit"]
    rounds += ["--min-updates", str(1 + len(OTHERS))]
    secure = ["--secure", "--min-class-count", "2", "--min-holders", "3"]
    plain = ["--encoding", "int8", "--head-sums", "features"]  # the first update is several chunks
    return [*rounds, "--head", "class-means", *(secure if shape.secure else plain)]


@dataclass
class RealRun:
    federation: Federation
    observer: Observer
    shape: Shape
    servers: list[Process] = field(default_factory=list)

    @property
    def out(self) -> Path:
        return self.federation.server_folder

    @property
    def victim(self) -> Process:
        return self.federation.devices[VICTIM]

    @property
    def server(self) -> Process:
        return self.servers[-1]

    def start_server(self, launcher: Sequence[str] = ("-m",)) -> None:
        settings = (*settings_of(self.shape), "--round-timeout", str(ROUND_TIMEOUT))
        self.servers.append(self.federation.start_server(*settings, launcher=launcher))

    def start(
        self, device: str, launcher: Sequence[str] = ("-m",), environment: Mapping[str, str] | None = None
    ) -> None:
        again = (self.federation.state(device) / "identity").exists()
        bundle = str(self.federation.bundle)
        self.federation.start_device(
            device, "--bundle", bundle, again=again, launcher=launcher, environment=environment
        )

    def start_others(self) -> None:
        for name in OTHERS:
            self.start(name)

    def finish(self) -> None:
        for process in (self.server, *self.federation.devices.values()):
            ended = process.wait(RUN_SECONDS)
            assert ended.code == 0, (process.log.name, ended.code, ended.stderr[-2000:])

    def check(self, row: Row, undisturbed: Reference) -> None:
        """Waits for the end of the run, which the oracle examines."""
        self.finish()
        self.observer.catch_up()
        acknowledged = {
            (ack.round, ack.device)
            for ack in self.observer.seen
            if isinstance(ack, Ack) and ack.verdict in (Verdict.ACCEPTED, Verdict.DUPLICATE)
        }
        findings = examine(self.out, acknowledged, undisturbed)
        row.add(findings)
        assert findings.compared == findings.recomputed


def undisturbed_run(shape: Shape, bundle: Path, photos: Mapping[str, Path], folder: Path, kind: str) -> Reference:
    with Processes(folder / "logs") as processes:
        broker = RestartableBroker(processes, folder, kind)
        with Observer(broker, RUN) as observer:
            run = RealRun(Federation(RUN, broker, bundle, photos, folder, processes), observer, shape)
            run.start_server()
            for name in photos:
                run.start(name)
            run.finish()
    return reference(run.out)
