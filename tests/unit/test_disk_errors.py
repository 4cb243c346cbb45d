"""What the server's log says about a folder that cannot be used."""

from __future__ import annotations

import errno
import os
import sqlite3
from pathlib import Path

import pytest

from trainer_server.service.disk_errors import reason_and_remedy


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "free some disk space"),
        (errno.ENOENT, "restore the folder"),
        (errno.EIO, "check the disk"),
        (errno.EMFILE, "open files"),
    ],
)
def test_the_remedy_fits_the_error(number: int, remedy: str) -> None:
    text = os.strerror(number)
    assert reason_and_remedy(OSError(number, text, "of some file"))[0] == text
    assert remedy in reason_and_remedy(OSError(number, text))[1]


def test_a_database_whose_folder_was_deleted_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "run.sqlite"
    database = sqlite3.connect(path)
    database.execute("CREATE TABLE rows (number INTEGER)")
    path.unlink()
    with pytest.raises(sqlite3.Error) as caught:
        database.execute("INSERT INTO rows VALUES (1)")
    assert "restore the folder" in reason_and_remedy(caught.value)[1]
