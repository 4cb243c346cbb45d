"""int8 products of ONNX Runtime on x86-64 processors without VNNI (before 2019): of signed weights they saturate.
Newer releases can take unsigned ones there, which are slower and exact."""

from __future__ import annotations

from typing import Any

SINCE = (1, 32)  # tried; 1.19 aborts on weights that are mapped from a file


def keep_int8_exact(options: Any, version: str) -> None:
    """Of a session's `options`, for an ONNX Runtime of this version. Without effect on other processors."""
    if tuple(int(part) for part in version.split(".")[:2]) >= SINCE:
        options.add_session_config_entry("session.x64quantprecision", "1")
