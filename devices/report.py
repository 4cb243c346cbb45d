from __future__ import annotations
from pathlib import Path


def write_report(folder: Path, *, seed: int, alpha: float, seconds: dict[str, float]) -> None:
    print(seconds)
