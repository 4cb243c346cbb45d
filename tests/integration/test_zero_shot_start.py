"""A run of CLIP that starts from the zero-shot head, with real processes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from support.bundles import Built
from support.processes import Broker, Federation, Observer, Processes

from fedfmsl.protocol.messages import Globals, Round, Stage
from fedfmsl.protocol.tensors import unpack


def test_stage_1_starts_from_the_scaled_directions_of_the_class_names(
    clip: Built, photos: dict[str, Path], broker: Broker, tmp_path: Path
) -> None:
    folders = {name: photos[name] for name in ("device-0", "device-2")}
    with Processes(tmp_path / "logs") as processes:
        federation = Federation("zero-shot", broker, clip.bundle.root, folders, tmp_path, processes)
        with Observer(broker, "zero-shot") as observer:
            server = federation.start_server("--head", "zero-shot", "--stage1-rounds", "1", "--stage2-rounds", "1")
            devices = [federation.start_device(name, "--bundle", str(clip.bundle.root)) for name in folders]
            observer.wait(Round, lambda r: r.stage is Stage.FINISHED, "the end")
            assert [process.wait().code for process in (server, *devices)] == [0, 0, 0]
            first = observer.wait(Round, lambda r: r.stage is Stage.GLOBAL, "stage 1")
            _, start = unpack(observer.blobs[first.start], Globals)
    zero_shot = clip.bundle.task.zero_shot
    assert zero_shot is not None
    weight = start["classifier.weight"]
    lengths = np.linalg.norm(weight, axis=1)
    assert np.allclose(weight / lengths[:, None], zero_shot.rows, atol=1e-6)
    assert np.allclose(lengths, lengths[0])  # scale / mean norm of the devices' features
    assert not start["classifier.bias"].any()
    last = federation.rounds()[-1]
    assert set(last["updates"]) == set(folders)
