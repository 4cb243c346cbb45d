"""The lock of a run's folder and of a state directory."""

from __future__ import annotations

import threading
from pathlib import Path

from fedfmsl.common.lock_file import held, is_held

TRIES = 300


def test_a_look_at_a_lock_never_keeps_a_process_from_taking_it(tmp_path: Path) -> None:
    lock, ended = tmp_path / "lock", threading.Event()
    lock.touch()

    def look() -> None:
        while not ended.is_set():
            is_held(lock)

    lookers = [threading.Thread(target=look) for _ in range(4)]
    for thread in lookers:
        thread.start()
    try:
        for _ in range(TRIES):
            with held(lock):
                assert is_held(lock)
    finally:
        ended.set()
        for thread in lookers:
            thread.join()
    assert is_held(lock) is False
    assert is_held(tmp_path / "none") is None
