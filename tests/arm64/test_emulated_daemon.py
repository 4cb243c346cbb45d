"""A daemon on the emulated board, installed from the wheel, with a server and a device on the host."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from support.arm64.board import Board
from support.arm64.bundles import export
from support.arm64.recording import Recorder, replay
from support.processes import Federation, Process, Processes, free_port
from support.samples import CLASSES, write_device_photos
from transformers import ViTConfig, ViTForImageClassification

from edge_runtime.store import DeviceStore
from fedfmsl.algorithms.arrays import Tensors
from fedfmsl.protocol.messages import Progress, Round, Stage

# AdamW divides a gradient by its own size, so the rounding error of a tiny gradient becomes part of a step.
TOLERANCE = 1e-4  # of a single value
OF_THE_NORM = 1e-3  # of the norm of all values
RUN, PI, PC = "orchard", "pi", "pc"
STATE = "/var/lib/fedfmsl"
SHAPE = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768}
ROUNDS = ("--stage1-rounds", "4", "--stage2-rounds", "3", "--sal", "fixed-schedule")  # each ends at level 2
RATES = ("--learning-rate", "0.002", "--local-learning-rate", "0.0005")  # the defaults of a run
TIMEOUT = 900.0  # seconds; an emulated daemon is some 30 times slower


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a randomly initialized ViT-Ti/16 at 64 px, up to level 2."""
    folder = tmp_path_factory.mktemp("bundle")
    torch.manual_seed(0)
    ViTForImageClassification(ViTConfig(patch_size=16, image_size=64, **SHAPE)).save_pretrained(folder / "vit")
    return export(folder / "out", str(folder / "vit"), levels=2, image_size=64)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("photos")
    return {
        PI: write_device_photos(folder / PI, {"apple": 6, "kiwi": 5, "lemon": 5}, seed=1),
        PC: write_device_photos(folder / PC, dict.fromkeys(CLASSES, 8), seed=2),
    }


def start_pi(board: Board, federation: Federation, log: str) -> Process:
    """The same command at each start. The device downloads its bundle from the server."""
    command = [
        *("python3", "-m", "edge_runtime", "run", "--run", RUN, "--images", "/home/pi/photos", "--device", PI),
        *("--broker", federation.broker.url, "--state", STATE, "--memory", "512MB", "--threads", "2"),
    ]
    return federation.processes.start(log, *board.command(*command))


def killed_once(board: Board, federation: Federation, recorder: Recorder) -> None:
    """Runs a federation whose emulated device is killed while it works on the second round of stage 1."""
    federation.start_server("--serve", f"127.0.0.1:{free_port()}", *ROUNDS, *RATES, "--head", "zeros")
    federation.start_device(PC, "--bundle", str(federation.bundle))
    first = start_pi(board, federation, "pi-first-start")
    second_round = recorder.wait(
        Round, lambda r: (r.stage, r.index) == (Stage.GLOBAL, 1), "stage 1's second round", seconds=TIMEOUT
    )
    at_work = recorder.wait(
        Progress,
        lambda p: p.device == PI,
        "its progress",
        since=recorder.seen.index(second_round),
        seconds=TIMEOUT,
    )
    first.kill()
    assert (PI, second_round.round) not in recorder.answers, f"killed too late, after {at_work}"
    second = start_pi(board, federation, "pi-second-start")
    recorder.wait(Round, lambda r: r.stage is Stage.FINISHED, "the run's end", seconds=TIMEOUT)
    assert second.wait(TIMEOUT).code == 0, second.stderr


def differences(one: Tensors, other: Tensors) -> tuple[float, float]:
    """The largest difference of a value, and the norm of the differences as a share of the norm of the values."""
    assert one.keys() == other.keys()
    values, others = (np.concatenate([np.ravel(tensors[name]) for name in sorted(one)]) for tensors in (one, other))
    difference = np.asarray(values, np.float64) - others
    return float(np.abs(difference).max()), float(np.linalg.norm(difference) / np.linalg.norm(others))


def test_an_emulated_device_sends_the_updates_of_a_device_on_x86_64(
    board: Board, bundle: Path, photos: dict[str, Path], tmp_path: Path
) -> None:
    """In both stages, although it is killed once. A daemon with the same name and photos on the host gets the same
    announcements and globals; the test compares every value of every update."""
    shutil.copytree(photos[PI], board.path("/home/pi/photos"))
    with Processes(tmp_path / "arm64-logs") as processes:
        federation = Federation(RUN, processes.start_broker("mosquitto"), bundle, photos, tmp_path / "arm64", processes)
        with Recorder(federation.broker, RUN) as recorded:
            killed_once(board, federation, recorded)
    with Processes(tmp_path / "x86-64-logs") as processes:
        again = Federation(RUN, processes.start_broker("mosquitto"), bundle, photos, tmp_path / "x86-64", processes)
        with Recorder(again.broker, RUN) as recorder:
            device = again.start_device(PI, "--bundle", str(bundle), "--memory", "512MB")
            replay(recorded, PI, again.broker, recorder)
            assert device.wait().code == 0, device.stderr
    asked = [announced for announced in recorded.rounds if announced.stage is not Stage.FINISHED]
    assert [r.stage for r in asked] == [
        *[Stage.GLOBAL] * 4,
        Stage.HEAD,
        *[Stage.PERSONAL] * 3,
        Stage.EVALUATE,
    ]
    assert [r.level for r in asked if r.stage is Stage.GLOBAL] == [1, 1, 1, 2]
    evaluations = [seen.answers[PI, asked[-1].round].header for seen in (recorded, recorder)]
    assert evaluations[0].counts == evaluations[1].counts
    compared: dict[str, tuple[float, float]] = {}
    for announced in asked[:-1]:
        emulated, real = (seen.answers[PI, announced.round] for seen in (recorded, recorder))
        assert (emulated.header.level, emulated.header.samples) == (real.header.level, real.header.samples)
        compared[f"{announced.stage.value} {announced.index}"] = differences(emulated.tensors, real.tensors)
    experts = [load_file(DeviceStore(folder).personal) for folder in (board.path(STATE), again.state(PI))]
    compared["local expert"] = differences(*experts)
    for what, (largest, share) in compared.items():
        print(f"{what:<14}{largest:.1e} {share:.1e}")
    assert max(largest for largest, _ in compared.values()) < TOLERANCE
    assert max(share for _, share in compared.values()) < OF_THE_NORM
