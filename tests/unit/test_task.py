"""A run's task: what is valid, and how it joins a bundle."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.bundles import Built
from support.samples import CLASSES

from fedfmsl.errors import BundleError, ConfigError, MessageError
from fedfmsl.protocol.bundle import Bundle
from fedfmsl.protocol.class_names import MAX_CLASSES
from fedfmsl.protocol.task import TASK, Task, ZeroShot
from fedfmsl.protocol.task_bundle import TaskBundle

SHA = "a" * 64
ROWS = np.eye(3, 20, dtype=np.float32)


@pytest.mark.parametrize(
    "task",
    [
        Task(SHA, ("apple", "pear")),
        Task(SHA, ("apple", 'a "b", \\ c', "Öl"), ZeroShot(ROWS, 100.0, ("a photo of a {}.",)), version=7),
        Task(SHA, tuple(f"{index:04}{chr(34) * 251}" for index in range(MAX_CLASSES))),  # the longest list
    ],
    ids=["names", "zero-shot", "longest"],
)
def test_a_task_is_its_bytes(task: Task, tmp_path: Path) -> None:
    (tmp_path / "task").write_bytes(task.blob)
    again = Task.read(tmp_path / "task")
    assert (again.bundle, again.classes, again.version) == (task.bundle, task.classes, task.version)
    assert (again.blob, again.sha256) == (task.blob, task.sha256)
    if task.zero_shot and again.zero_shot:
        np.testing.assert_array_equal(again.zero_shot.rows, task.zero_shot.rows)
        assert (again.zero_shot.scale, again.zero_shot.prompts) == (100.0, ("a photo of a {}.",))
    assert replace(task, version=8).sha256 != task.sha256


def test_added_classes_follow_the_others_and_have_no_zero_shot_row() -> None:
    task = Task(SHA, ("apple", "pear", "plum"), ZeroShot(ROWS, 100.0), version=2)
    again = Task.unpack(task.with_classes(["Öl", "fig"]).blob)
    assert (again.classes, again.version) == ((*task.classes, "Öl", "fig"), 3)
    assert again.zero_shot is not None and again.zero_shot.scale == 100.0
    np.testing.assert_array_equal(again.zero_shot.rows, np.concatenate([ROWS, np.zeros((2, 20))]))
    with pytest.raises(ConfigError, match="'plum' is named twice"):
        task.with_classes(["plum"])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("apple",), "at least two classes, got 1"),
        (("apple", "apple"), "'apple' is named twice"),
        (("apple", "unknown"), "'unknown' has the name that predictions use"),
        (("apple", "../pear"), "the path .. in it"),
        (("apple", "o\u0308l"), "not in Unicode's normal form NFC; make the task again"),
    ],
)
def test_a_task_with_invalid_names_is_refused(names: tuple[str, ...], message: str) -> None:
    with pytest.raises(MessageError, match=f"the task.*{message}"):
        Task.unpack(Task(SHA, names).blob)


@pytest.mark.parametrize(
    "zero_shot", [ZeroShot(ROWS[:2], 1.0), ZeroShot(ROWS[0], 1.0), ZeroShot(ROWS * np.float32(np.nan), 1.0)]
)
def test_a_zero_shot_head_of_other_classes_is_refused(zero_shot: ZeroShot) -> None:
    with pytest.raises(MessageError, match=r"zero-shot head is float32.*, expected finite float32\[3, F\]"):
        Task.unpack(Task(SHA, ("apple", "pear", "plum"), zero_shot).blob)


def test_names_are_put_into_their_normal_form() -> None:
    assert Task.of(SHA, ("o\u0308l", "essig"), "--classes").classes == ("öl", "essig")
    with pytest.raises(ConfigError, match="--classes: class 'apple' is named twice"):
        Task.of(SHA, ("apple", "apple"), "--classes")


@pytest.mark.parametrize("content", [None, b"", b"x" * 100], ids=["none", "empty", "noise"])
def test_a_file_that_is_no_task_is_one_clear_error(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / TASK).write_bytes(content)
    with pytest.raises(BundleError, match=r"task .*task\.safetensors.*--classes"):
        Task.read(tmp_path / TASK)


def test_a_task_is_never_used_with_another_bundle(vit: Built, dinov2: Built, tmp_path: Path) -> None:
    (tmp_path / TASK).write_bytes(vit.bundle.task.blob)
    assert TaskBundle.load(vit.bundle.root, tmp_path / TASK).classes == CLASSES
    with pytest.raises(BundleError, match=rf"task {tmp_path / TASK} belongs to another bundle .*; pass its --bundle"):
        TaskBundle.load(dinov2.bundle.root, tmp_path / TASK)


def test_a_head_of_another_width_is_refused(vit: Built) -> None:
    task = replace(vit.bundle.task, zero_shot=ZeroShot(np.ones((len(CLASSES), 3), np.float32), 1.0))
    with pytest.raises(BundleError, match=r"zero-shot head \[4, 3\], expected 32 columns"):
        TaskBundle(vit.bundle, task)


def test_a_bundle_without_a_task_asks_for_the_classes(vit: Built, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes((vit.bundle.root / "manifest.json").read_bytes())
    with pytest.raises(BundleError, match=r"has no task\.safetensors; name the classes with --classes, or pass --task"):
        TaskBundle.load(tmp_path)


def test_the_layout_follows_from_bundle_and_task(vit: Built) -> None:
    bundle = Bundle.load(vit.bundle.root)
    some, more = (TaskBundle(bundle, Task(bundle.sha256, tuple(map(str, range(count))))) for count in (2, 9))
    feature = bundle.manifest.dims.feature
    assert (some.expert.size(0), more.expert.size(0)) == (2 * (feature + 1), 9 * (feature + 1))
    assert more.tuned_parameters - some.tuned_parameters == 7 * (feature + 1)
    (small, gate), (large, same_gate) = some.initial(), more.initial()
    assert not large[: more.expert.size(0)].any()
    np.testing.assert_array_equal(small[some.expert.size(0) :], large[more.expert.size(0) :])
    np.testing.assert_array_equal(gate, same_gate)


def test_nothing_of_a_bundle_names_its_classes(vit: Built) -> None:
    manifest: dict[str, Any] = json.loads((vit.bundle.root / "manifest.json").read_bytes())
    assert TASK not in manifest["files"] and not any(name in json.dumps(manifest) for name in CLASSES)
