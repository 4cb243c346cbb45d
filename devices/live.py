from __future__ import annotations
from pathlib import Path


class LiveView:
    def __init__(self, broker: str, run: str, folder: Path) -> None: ...
    def __enter__(self):
        return self

    def __exit__(self, *_): ...
    def refresh(self) -> None: ...
