"""The tests' own helpers for missing programs and shared folders. A helper that does nothing would hide what is not
tested."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from support.shared_folders import fingerprint, made_once
from support.tools import NOT_TESTED, find_tool, not_tested, require_tool, summary


@pytest.fixture
def nothing_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


def test_a_program_that_is_installed_is_found_by_its_path() -> None:
    assert Path(require_tool("sh")).is_file()


@pytest.mark.usefixtures("nothing_installed")
def test_a_missing_program_skips_the_test_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    assert find_tool("mmdebstrap") is None
    with pytest.raises(pytest.skip.Exception, match=r"mmdebstrap is not installed \(apt-get install mmdebstrap\)"):
        require_tool("mmdebstrap")


@pytest.mark.usefixtures("nothing_installed")
def test_a_missing_program_fails_the_test_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match=r"qemu-user-static"):
        require_tool("qemu-aarch64-static")


def test_what_cannot_be_installed_is_skipped_in_ci_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.skip.Exception, match="Linux"):
        not_tested("Linux 6.3 or newer is needed")


def test_the_summary_counts_what_the_machine_lacks_and_not_what_was_skipped_by_choice() -> None:
    missing = f"Skipped: {NOT_TESTED}mosquitto is not installed"
    text = summary([missing, "Skipped: in the long form only (--full)", missing, f"{NOT_TESTED}no tmpfs"])
    assert text == f"{NOT_TESTED}mosquitto is not installed (2×); no tmpfs (1×)"
    assert summary(["Skipped: in the long form only (--full)"]) == ""


def test_a_shared_folder_is_made_once_and_is_complete_when_it_is_seen(tmp_path: Path) -> None:
    made: list[Path] = []

    def make(folder: Path) -> None:
        made.append(folder)
        folder.mkdir()
        (folder / "first").touch()
        time.sleep(0.1)
        (folder / "last").touch()

    def use() -> None:
        folder = made_once(tmp_path / "shared", make)
        assert sorted(path.name for path in folder.iterdir()) == ["first", "last"]

    threads = [threading.Thread(target=use) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1


def test_a_shared_folder_that_was_left_unfinished_is_made_again(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        folder.mkdir()
        (folder / "half").touch()
        raise OSError

    with pytest.raises(OSError):
        made_once(tmp_path / "shared", fail)
    assert not (tmp_path / "shared").exists()
    assert list(made_once(tmp_path / "shared", Path.mkdir).iterdir()) == []


def test_a_fingerprint_changes_with_the_code(tmp_path: Path) -> None:
    keys = set()
    for name, text in (("one", "x = 1"), ("two", "x = 2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "module.py").write_text(text)
        keys.add(fingerprint([tmp_path / name], ["numpy"]))
    assert len(keys) == 2
