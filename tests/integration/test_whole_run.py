"""Broker, server and three daemons as separate processes, from the first message to the personalized models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file
from support.processes import Federation, Observer, Process, Processes, free_port, run_module
from support.tools import find_tool

from edge_runtime.data.inputs import reader_for
from fedfmsl.errors import shown
from fedfmsl.protocol.bundle import Bundle
from fedfmsl.protocol.messages import Globals, Round, Stage
from fedfmsl.protocol.peft_names import from_peft
from fedfmsl.protocol.task_bundle import TaskBundle
from fedfmsl.protocol.tensors import unpack

STAGE1, STAGE2 = 4, 2
RUN = "whole"  # of both runs: it is part of what is hashed
DEVICES = ("device-0", "device-1", "device-2")
WITHOUT_BUNDLE = "device-2"
CORRUPT = Path("train", "lemon", "torn\udcfc.jpg")  # in device-1's photos; a name that is not UTF-8
FORBIDDEN = ("torch", "transformers", "onnx", "peft", "optimum")
ACCURACIES = ("start", "global", "global_prior", "local_expert", "local_only", "mofm")


@dataclass(frozen=True)
class Finished:
    """The results of a whole run."""

    federation: Federation
    broker: str
    codes: dict[str, int]
    rounds: list[dict[str, Any]]
    last: Round
    blobs: dict[str, bytes]
    libraries: dict[str, set[str]]  # of each daemon, while it evaluates

    def process(self, name: str) -> Process:
        return self.federation.processes.started[name]

    @property
    def adapter(self) -> Path:
        return self.federation.server_folder / "global_expert"


Runner = Callable[[str], Finished]


@pytest.fixture(scope="module")
def whole_run(bundle: Path, photos: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    """Runs the same run once per kind of broker."""
    mine = tmp_path_factory.mktemp("photos")
    torn = shutil.copytree(photos["device-1"], mine / "device-1")
    (torn / CORRUPT).write_bytes((torn / "train" / "lemon" / "00.jpg").read_bytes()[:300])
    done: dict[str, Finished] = {}

    def runner(kind: str) -> Finished:
        if kind not in done:
            done[kind] = finish(kind, bundle, {**photos, "device-1": torn}, tmp_path_factory.mktemp(kind))
        return done[kind]

    yield runner


def finish(kind: str, bundle: Path, photos: dict[str, Path], folder: Path) -> Finished:
    with Processes(folder / "logs") as processes:
        broker = processes.start_broker(kind.split("-")[0])
        federation = Federation(RUN, broker, bundle, photos, folder, processes)
        with Observer(broker, RUN) as observer:
            server = federation.start_server(
                *("--stage1-rounds", str(STAGE1), "--stage2-rounds", str(STAGE2), "--baseline", "--secure-sums"),
                *("--serve", f"127.0.0.1:{free_port()}"),
            )
            for name in photos:
                fetched = name == WITHOUT_BUNDLE
                federation.start_device(
                    name,
                    *([] if fetched else ["--bundle", str(bundle)]),
                    environment={"PYTHONPROFILEIMPORTTIME": "1"},
                )
            observer.wait(Round, lambda r: r.stage is Stage.EVALUATE, "the evaluation")
            libraries = {name: device.libraries for name, device in federation.devices.items()}
            last = observer.wait(Round, lambda r: r.stage is Stage.FINISHED, "the end")
            codes = {name: device.wait().code for name, device in federation.devices.items()}
            codes["server"] = server.wait().code
    return Finished(federation, broker.kind, codes, federation.rounds(), last, observer.blobs, libraries)


@pytest.fixture(scope="module")
def run(whole_run: Runner) -> Finished:
    return whole_run("amqtt")


@pytest.fixture(scope="module")
def repeated(whole_run: Runner) -> Finished:
    """The same run a second time, on mosquitto if it is installed."""
    return whole_run("mosquitto" if find_tool("mosquitto") else "amqtt-again")


def test_every_process_exits_with_0(run: Finished) -> None:
    assert run.codes == dict.fromkeys((*DEVICES, "server"), 0)


@pytest.mark.needs("mosquitto")
def test_the_run_also_works_on_mosquitto(repeated: Finished) -> None:
    assert repeated.broker == "mosquitto"
    assert repeated.codes == dict.fromkeys((*DEVICES, "server"), 0)
    assert not any(line["missing"] for line in repeated.rounds)


def test_the_records_hold_every_round_with_every_device(run: Finished) -> None:
    expected = [("global", index) for index in range(STAGE1)]
    expected += [("keys", 0), ("shares", 0), ("holders", 1), ("unmask", 0), ("head", 0), ("unmask", 1)]
    expected += [("personal", index) for index in range(STAGE2)]
    expected += [("baseline", 0), ("evaluate", 0)]
    assert [(line["round"]["stage"], line["round"]["index"]) for line in run.rounds] == expected
    assert [line["round"]["round"] for line in run.rounds] == list(range(1, len(expected) + 1))
    for line in run.rounds:
        assert tuple(line["updates"]) == DEVICES
        assert not line["missing"] and not line["repeated"]
        assert all(size > 0 for size in line["bytes_up"].values())


def test_levels_grow_from_one_and_never_shrink(run: Finished) -> None:
    levels = [line["round"]["level"] for line in run.rounds if line["round"]["stage"] == "global"]
    assert levels[0] == 1
    assert levels == sorted(levels)


@pytest.mark.parametrize("device", DEVICES)
def test_a_device_reports_every_accuracy_and_little_memory(run: Finished, device: str) -> None:
    update = run.rounds[-1]["updates"][device]
    assert {name: update["metrics"][name] for name in ACCURACIES if not 0 <= update["metrics"][name] <= 1} == {}
    assert 0 <= update["metrics"]["mean_local_weight"] <= 1
    assert max(line["updates"][device]["peak_rss_mb"] for line in run.rounds) < 400


def test_the_federation_learns_the_colours(run: Finished) -> None:
    updates = run.rounds[-1]["updates"].values()
    assert np.mean([update["metrics"]["mofm"] for update in updates]) > 0.8  # chance is under 0.5


def test_a_device_sends_only_what_the_protocol_names(run: Finished) -> None:
    """Sums in the head round, gate adapters in stage 2, numbers in the evaluation. The local expert is not sent."""
    bundle = TaskBundle.load(run.federation.bundle)
    gate, classes = bundle.gate, len(bundle.classes)
    sums = classes * (classes + 1) + classes * (classes + 1) // 2
    for line in run.rounds:
        if line["round"]["stage"] == "head":
            assert sums * 4 < min(line["bytes_up"].values()) <= max(line["bytes_up"].values()) < sums * 4 + 4096
        if line["round"]["stage"] == "personal":
            assert max(line["bytes_up"].values()) < gate.total * 4 + 4096
        if line["round"]["stage"] in ("baseline", "evaluate"):
            assert max(line["bytes_up"].values()) < 4096


def announced_expert(run: Finished) -> NDArray[np.float32]:
    """The global expert as the server announced it last, and devices received it."""
    _, tensors = unpack(run.blobs[run.last.expert], Globals)
    return TaskBundle.load(run.federation.bundle).expert.join(tensors)


def test_the_adapter_is_the_announced_global_expert(run: Finished) -> None:
    bundle = TaskBundle.load(run.federation.bundle)
    tensors = from_peft(bundle.manifest.peft, load_file(run.adapter / "adapter_model.safetensors"))
    np.testing.assert_array_equal(bundle.expert.join(tensors), announced_expert(run))


def test_the_adapter_in_torch_gives_the_logits_of_the_global_expert(run: Finished, vit_folder: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForImageClassification

    bundle = TaskBundle.load(run.federation.bundle)
    manifest, level = bundle.manifest, run.last.level
    paths = sorted(run.federation.photos["device-2"].rglob("*.jpg"))
    pixels = reader_for(manifest.preprocessing).batch(paths)["pixels"]
    (hidden,) = session(bundle.path("features.onnx")).run([f"hidden_{level}"], {"pixels": pixels})
    predict = session(bundle.path(f"predict-{level}.onnx"))
    (ours,) = predict.run(["logits"], {"hidden": hidden, "theta": announced_expert(run)})

    base = AutoModelForImageClassification.from_pretrained(
        vit_folder, num_labels=len(bundle.classes), ignore_mismatched_sizes=True
    )
    model = PeftModel.from_pretrained(base, str(run.adapter)).eval()
    mean, std = (np.array(v, np.float32) for v in (manifest.preprocessing.mean, manifest.preprocessing.std))
    normal = (pixels.astype(np.float32) / 255 - mean) / std
    with torch.no_grad():
        theirs = model(pixel_values=torch.from_numpy(normal.transpose(0, 3, 1, 2).copy())).logits.numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-3, rtol=0)
    assert np.ptp(theirs) > 1  # there is something to compare


def session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def results(run: Finished, device: str) -> dict[str, list[float]]:
    """The daemon's own probabilities of its test images."""
    found: dict[str, list[float]] = json.loads((run.federation.state(device) / "results.json").read_text())[
        "probabilities"
    ]
    return found


@pytest.mark.parametrize("device", DEVICES)
def test_a_personalized_model_gives_the_probabilities_of_the_daemon(run: Finished, device: str, tmp_path: Path) -> None:
    alone = shutil.copy(run.federation.state(device) / "personalized.onnx", tmp_path)  # it needs no other file
    model, preprocessing = session(Path(alone)), TaskBundle.load(run.federation.bundle).manifest.preprocessing
    own = results(run, device)
    assert len(own) == run.rounds[-1]["updates"][device]["samples"] > 0
    pixels = reader_for(preprocessing).batch([Path(name) for name in own])["pixels"]
    (probabilities,) = model.run(["probabilities"], {"pixels": pixels})
    np.testing.assert_allclose(probabilities, np.array(list(own.values())), atol=1e-4, rtol=0)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)


def test_predict_prints_classes_and_probabilities(run: Finished) -> None:
    photo = next(iter(results(run, "device-0")))
    model = run.federation.state("device-0") / "personalized.onnx"
    ended = run_module("edge_runtime", "predict", "--model", str(model), photo, "--top", "2")
    assert ended.code == 0, ended.stderr
    (line,) = ended.stdout.splitlines()
    assert line.startswith(f"{photo}: ")
    assert line.count("%") == 2
    assert any(name in line.removeprefix(photo) for name in ("apple", "kiwi"))


def test_predict_prints_json_for_a_folder(run: Finished) -> None:
    own = results(run, "device-1")
    folder = run.federation.photos["device-1"] / "test"
    model = run.federation.state("device-1") / "personalized.onnx"
    ended = run_module("edge_runtime", "predict", "--model", str(model), str(folder), "--json")
    assert ended.code == 0, ended.stderr
    printed = {line["file"]: line["probabilities"] for line in map(json.loads, ended.stdout.splitlines())}
    assert set(printed) == set(own)
    for file, probabilities in printed.items():
        assert list(probabilities) == list(TaskBundle.load(run.federation.bundle).classes)
        np.testing.assert_allclose(list(probabilities.values()), own[file], atol=1e-4, rtol=0)


def test_a_corrupt_photo_is_skipped_and_named(run: Finished) -> None:
    torn = run.federation.photos["device-1"] / CORRUPT
    assert f"skipped: {shown(torn)}: not a readable image" in run.process("device-1").stdout
    assert run.codes["device-1"] == 0


def test_a_device_without_a_bundle_downloads_it(run: Finished) -> None:
    sha256 = Bundle.load(run.federation.bundle).sha256
    fetched = Bundle.load(run.federation.state(WITHOUT_BUNDLE) / "bundles" / sha256)
    fetched.verify()
    assert fetched.sha256 == sha256
    assert not list(fetched.root.glob("*.part"))


@pytest.mark.parametrize("device", DEVICES)
def test_a_daemon_never_imports_torch_or_onnx(run: Finished, device: str) -> None:
    lines = [line for line in run.process(device).stderr.splitlines() if line.startswith("import time:")]
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in lines}
    assert "onnxruntime" in imported  # the list is not empty
    assert not imported & set(FORBIDDEN)


@pytest.mark.parametrize("device", DEVICES)
def test_a_running_daemon_has_no_library_of_torch_or_onnx_in_memory(run: Finished, device: str) -> None:
    packages = {part for library in run.libraries[device] for part in Path(library).parts}
    assert "onnxruntime" in packages
    assert not packages & set(FORBIDDEN)


def comparable(line: dict[str, Any]) -> dict[str, Any]:
    """A round without its session, seconds, bytes, keys and shares, which differ from run to run."""
    kept = {key: value for key, value in line.items() if key not in ("seconds", "bytes_up")}
    kept["round"] = {key: value for key, value in line["round"].items() if key not in ("session", "roster", "shares")}
    volatile = ("session", "seconds", "peak_rss_mb", "bytes_down")
    kept["updates"] = {
        name: {key: value for key, value in update.items() if key not in volatile}
        for name, update in line["updates"].items()
    }
    return kept


def test_the_same_seed_gives_the_same_rounds(run: Finished, repeated: Finished) -> None:
    """Levels, metrics, and the hashes of all globals."""
    assert [comparable(line) for line in run.rounds] == [comparable(line) for line in repeated.rounds]


def test_the_same_seed_gives_the_same_adapter(run: Finished, repeated: Finished) -> None:
    folders = [{path.name: path.read_bytes() for path in each.adapter.iterdir()} for each in (run, repeated)]
    weights = "adapter_model.safetensors"
    assert set(folders[0]) == {"adapter_config.json", weights, "labels.json", "README.md", "preprocessor_config.json"}
    assert folders[0] == folders[1]


@pytest.mark.parametrize("device", DEVICES)
def test_the_same_seed_gives_the_same_personalized_model(run: Finished, repeated: Finished, device: str) -> None:
    """Except for the session in its metadata, which is random."""
    models = [onnx.load(str(r.federation.state(device) / "personalized.onnx")) for r in (run, repeated)]
    sessions = set()
    for model in models:
        (entry,) = [entry for entry in model.metadata_props if entry.key == "session"]
        sessions.add(entry.value)
        entry.value = ""
    assert len(sessions) == 2
    assert models[0].SerializeToString(deterministic=True) == models[1].SerializeToString(deterministic=True)
