"""Names of classes keep their spaces and commas in lists, files and messages."""

from __future__ import annotations

from pathlib import Path

import pytest

from devices.trial.settings import TrialSettings
from fedfmsl.common.files import write_atomically
from fedfmsl.common.settings import SettingsError, read_settings
from fedfmsl.protocol.class_names import check_names, joined_names, read_names, split_names, write_names
from fedfmsl.protocol.messages import Prediction, parse

NAMES = [
    "tench, Tinca tinca",
    " apple",
    "kiwi ",
    "two  spaces",
    'a "quoted" one',
    "Äpfel",
    "Sci/Tech",
    "½ 🍎",
    "-x",
    "#1",
]


def test_names_pass_through_lists_files_and_settings(tmp_path: Path) -> None:
    assert split_names(joined_names(NAMES)) == NAMES
    write_names(tmp_path / "new" / "classes.txt", NAMES)
    assert read_names(tmp_path / "new" / "classes.txt", "--classes-file") == NAMES
    flags = {"images": str(tmp_path), "classes": joined_names(NAMES)}
    assert read_settings(TrialSettings, flags=flags, environment=False).classes == tuple(NAMES)
    assert check_names(NAMES, "here") == tuple(NAMES)


def test_a_list_without_its_last_quote_is_a_wrong_setting(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="is not a list of names"):
        read_settings(TrialSettings, flags={"images": str(tmp_path), "classes": 'kiwi,"plum'}, environment=False)


def test_a_prediction_keeps_the_names_and_no_control_characters() -> None:
    probabilities = dict.fromkeys(NAMES, 0.1)
    sent = Prediction(
        device="d", file="a.jpg", time=1, label=NAMES[1], confidence=0.1, probabilities=probabilities, round=1
    )
    received = parse(Prediction, sent.model_dump_json().encode())
    assert received.label == " apple"
    assert [*received.probabilities] == NAMES
    hostile = parse(Prediction, sent.model_copy(update={"label": "x\x1b[2J"}).model_dump_json().encode())
    assert hostile.label == "x?[2J"
    assert sent.model_copy(update={"label": "unknown"}).label == "unknown"


def test_a_file_with_a_name_of_255_bytes_is_written(tmp_path: Path) -> None:
    path = tmp_path / ("ü" * 126 + ".md")
    write_atomically(path, b"text")
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
