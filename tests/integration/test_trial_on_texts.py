"""A trial on a user's own texts: from a folder of .txt files to the personalized model and the adapter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from safetensors.numpy import load_file
from support.processes import Ended, run_module
from support.samples import CLASSES, write_photos, write_texts

from edge_runtime.data.inputs import reader_of
from fedfmsl.protocol.peft_names import from_peft
from fedfmsl.protocol.task_bundle import TaskBundle

DEVICES, INPUT, STAGE1 = 2, 3, 3


def trial(directory: Path, *options: str) -> Ended:
    return run_module("devices.trial", *options, "--devices", str(DEVICES), cwd=directory)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, bert_folder: Path) -> Path:
    directory = tmp_path_factory.mktemp("trial")
    texts = write_texts(directory / "texts", 30)
    (texts / CLASSES[0] / "empty.txt").touch()
    (texts / CLASSES[0] / "29.txt").rename(texts / CLASSES[0] / "29\udcfc.txt")  # not UTF-8; a test sample
    rounds = ("--stage1-rounds", str(STAGE1), "--stage2-rounds", "1", "--alpha", "5", "--name", "texts")
    ended = trial(directory, "--images", str(texts), "--model", str(bert_folder), *rounds)
    assert ended.code == 0, ended.stdout + ended.stderr
    assert f"skipped: {texts / CLASSES[0] / 'empty.txt'}: not a readable text" in ended.stdout
    assert "texts      96 to train on, 24 to test on" in ended.stdout
    return directory / "runs" / "texts"


def results(folder: Path, device: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = json.loads((folder / f"devices/device-{device}/results.json").read_text())[
        "probabilities"
    ]
    return found


def test_the_report_names_texts(folder: Path) -> None:
    report = json.loads((folder / "report.json").read_text())
    assert report["samples"] == "texts"
    assert sum(report["test_images"].values()) == 24
    page = (folder / "report.html").read_text()
    assert "test texts" in page
    assert "photos" not in page


@pytest.mark.parametrize("device", range(DEVICES))
def test_predict_gives_the_daemons_own_probabilities_from_the_file_alone(
    folder: Path, device: int, tmp_path: Path
) -> None:
    model = shutil.copy(folder / f"devices/device-{device}/personalized.onnx", tmp_path)
    samples = folder / f"samples/device-{device}/test"
    ended = run_module("edge_runtime", "predict", "--model", str(model), str(samples), "--json", cwd=tmp_path)
    assert ended.code == 0, ended.stderr
    printed = {Path(line["file"]).name: line["probabilities"] for line in map(json.loads, ended.stdout.splitlines())}
    own = {Path(name).name: values for name, values in results(folder, device).items()}
    assert set(printed) == set(own) != set()
    for name, probabilities in printed.items():
        assert tuple(probabilities) == CLASSES
        np.testing.assert_allclose(list(probabilities.values()), own[name], atol=1e-4, rtol=0)


def test_the_adapter_gives_the_global_experts_logits_on_transformers_own_class(folder: Path, bert_folder: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

    bundle = TaskBundle.load(folder / "bundle")
    paths = sorted((folder / "samples").rglob("*.txt"))[:16]
    tensors = from_peft(bundle.manifest.peft, load_file(folder / "global_expert" / "adapter_model.safetensors"))
    theta = bundle.expert.join(tensors)
    level = next(k for k in range(1, bundle.manifest.levels + 1) if bundle.expert.size(k) == theta.size)
    (hidden,) = session(bundle, "features.onnx").run([f"hidden_{level}"], reader_of(bundle).batch(paths))
    (ours,) = session(bundle, f"predict-{level}.onnx").run(["logits"], {"hidden": hidden, "theta": theta})

    base = AutoModelForSequenceClassification.from_pretrained(
        bert_folder, num_labels=len(CLASSES), ignore_mismatched_sizes=True
    )
    model = PeftModel.from_pretrained(base, str(folder / "global_expert")).eval()
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(bert_folder / "tokenizer.json"), pad_token="[PAD]")
    length = bundle.manifest.dims.tokens
    tokens = tokenizer(
        [path.read_text() for path in paths], padding=True, truncation=True, max_length=length, return_tensors="pt"
    )
    with torch.no_grad():
        theirs = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).logits.numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-3, rtol=0)
    assert np.ptp(theirs) > 0.01


def session(bundle: TaskBundle, name: str) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(bundle.path(name)), providers=["CPUExecutionProvider"])


def test_predict_names_an_unreadable_text(folder: Path, tmp_path: Path) -> None:
    model = str(folder / "devices/device-0/personalized.onnx")
    (tmp_path / "empty.txt").touch()
    photos = write_photos(tmp_path / "photos", 1)
    empty = run_module("edge_runtime", "predict", "--model", model, str(tmp_path / "empty.txt"))
    empty.assert_error(INPUT, "is not a readable text: it is empty")
    ended = run_module("edge_runtime", "predict", "--model", model, str(photos))
    reason, error = ended.stderr.splitlines()
    assert ended.code == INPUT
    assert reason.startswith("skipped: 4 files: .jpg is not a suffix of texts")
    assert error.startswith("error: no texts in")


def test_a_model_of_the_wrong_kind_is_an_error_before_the_run_starts(tmp_path: Path, vit_folder: Path) -> None:
    texts = write_texts(tmp_path / "texts")
    ended = trial(tmp_path, "--images", str(texts), "--model", str(vit_folder), "--alpha", "5")
    ended.assert_error(INPUT, "holds texts, but model tiny-vit takes images", "choose another --model")
