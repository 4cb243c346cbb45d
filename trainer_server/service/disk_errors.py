"""Says what to do about a run's folder that cannot be used."""

from __future__ import annotations

import errno
import sqlite3

from fedfmsl.common.files import EXHAUSTED, FULL, NO_DESCRIPTORS, has_descriptors


def reason_and_remedy(error: OSError | sqlite3.Error) -> tuple[str, str]:
    """Two texts for the log, the same for the same fault: without the file, which differs each time."""
    number = getattr(error, "errno", None)
    reason = getattr(error, "strerror", None) or str(error)
    if number in EXHAUSTED or not has_descriptors():
        return reason, NO_DESCRIPTORS
    if number in FULL or "full" in reason:  # of SQLite: database or disk is full
        return reason, "free some disk space"
    if number == errno.ENOENT or "readonly" in reason:  # of SQLite, if its file was deleted
        return reason, "if files of the run are gone, stop this server, restore the folder, and resume"
    return reason, "check the disk"
