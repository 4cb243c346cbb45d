"""Frigate's folders and its topic, as in its custom classification (Frigate 0.17)."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_runtime.data.inputs import IMAGES
from edge_runtime.labelling.destination import Destination
from edge_runtime.labelling.queue import Queue
from fedfmsl.common.class_folders import walk_classes
from fedfmsl.errors import ConfigError
from fedfmsl.protocol.frigate import check_state_topic, state_payload
from fedfmsl.protocol.messages import Prediction

ATTEMPT = "1607123955.475377-mxklsc-1607123961.837752-open-0.71.webp"


def test_its_dataset_is_a_sample_folder_and_its_attempts_are_not(tmp_path: Path) -> None:
    model = tmp_path / "clips" / "gate"
    for name in ("dataset/open/1.png", "dataset/closed/2.webp", f"train/{ATTEMPT}"):
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_bytes(b"x")
    classes = ("closed", "open")
    listing = walk_classes(model / "dataset", IMAGES.suffixes, "image", classes)
    assert {(file.label, file.name) for file in listing.files} == {("open", "open/1.png"), ("closed", "closed/2.webp")}
    assert not walk_classes(model, IMAGES.suffixes, "image", classes).files  # the folder above is not taken for it
    queue = Queue(tmp_path / "questions.sqlite")
    queue.describe(classes, "image")
    target, _ = Destination(model / "dataset", None, queue).reserve(model / "train" / ATTEMPT, "open")
    assert target == model / "dataset" / "open" / ATTEMPT


@pytest.mark.parametrize("topic", ["frigate/drive/classification/gate", "home/frigate/a b/classification/Pump LED"])
def test_its_topics_are_accepted(topic: str) -> None:
    assert check_state_topic(topic) == topic


@pytest.mark.parametrize("topic", ["frigate", "frigate/+/classification/gate", "frigate/events", "a/classification/#"])
def test_other_topics_are_refused(topic: str) -> None:
    with pytest.raises(ConfigError, match="Frigate"):
        check_state_topic(topic)


@pytest.mark.parametrize(("label", "payload"), [("open", b"open"), ("unknown", None)])
def test_the_payload_is_the_class(label: str, payload: bytes | None) -> None:
    said = Prediction(device="d", file="f", time=1, label=label, confidence=0.9, probabilities={"open": 0.9}, round=1)
    assert state_payload(said) == payload
