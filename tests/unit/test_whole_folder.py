"""Folders that are replaced as a whole, while others read them and after a crash at any step."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from fedfmsl.common.whole_folder import check_own, read_folder, write_folder
from fedfmsl.errors import ConfigError


def version(number: int) -> dict[str, bytes]:
    return dict.fromkeys(("a.json", "b.bin", "c.md"), b"%d" % number)


def test_a_reader_never_gets_a_mix_of_two_versions(tmp_path: Path) -> None:
    folder, ended = tmp_path / "expert", threading.Event()
    write_folder(folder, version(0))

    def write() -> None:
        for number in range(1, 100):
            write_folder(folder, version(number))
        ended.set()

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    while not ended.is_set():
        try:
            found = read_folder(folder)
        except FileNotFoundError:  # replaced at every attempt
            continue
        assert found in [version(int(found["a.json"]))]
    writer.join()
    assert read_folder(folder) == version(99)
    assert [path.name for path in tmp_path.iterdir()] == ["expert"]


def test_files_of_the_earlier_version_are_gone_and_a_link_stays(tmp_path: Path) -> None:
    write_folder(tmp_path / "real", {"old.txt": b"", "onnx/model.onnx": b"1"})
    (tmp_path / "link").symlink_to("real")
    write_folder(tmp_path / "link", {"onnx/model.onnx": [b"2", b"3"]})
    assert (tmp_path / "link").is_symlink()
    assert {path.name for path in (tmp_path / "real").rglob("*")} == {"onnx", "model.onnx"}
    assert (tmp_path / "real" / "onnx" / "model.onnx").read_bytes() == b"23"


@pytest.mark.parametrize("step", range(4))
def test_a_failure_at_any_step_leaves_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    folder = tmp_path / "expert"
    write_folder(folder, version(1))
    (tmp_path / ".expert.new").mkdir()  # left by a process that was killed
    steps = iter(range(100))

    def failing(name: str) -> None:
        plain = getattr(Path, name)

        def call(self: Path, *arguments: object, **options: object) -> object:
            if next(steps) == step:
                raise OSError(28, "No space left on device")
            return plain(self, *arguments, **options)

        monkeypatch.setattr(Path, name, call)

    failing("rename")
    failing("replace")
    with pytest.raises(OSError, match="No space"):
        write_folder(folder, {"a.json": b"2", "d.bin": b"2"})
    monkeypatch.undo()
    assert read_folder(folder) == version(1)
    write_folder(folder, version(3))
    assert read_folder(folder) == version(3)


def test_a_process_that_was_killed_between_the_renames_loses_no_version(tmp_path: Path) -> None:
    folder = tmp_path / "expert"
    write_folder(folder, version(1))
    folder.rename(tmp_path / ".expert.old")
    with pytest.raises(OSError):
        write_folder(folder, {"x" * 300: b""})
    assert read_folder(folder) == version(1)


def test_a_folder_with_files_of_others_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ConfigError, match=r"--to .* has other files, like thesis\.tex; pass a new or an empty folder"):
        check_own("--to", tmp_path, ["a.json"])
    check_own("--to", tmp_path, ["thesis.tex"])
    with pytest.raises(ConfigError, match="is a file; pass a folder"):
        check_own("--to", tmp_path / "thesis.tex", [])
