"""int8 products of ONNX Runtime on x86-64 processors without VNNI: with signed weights they saturate.

Newer releases can use unsigned weights there, which are exact and slower. With VNNI signed weights are exact too, and a
training step at level 2 takes half the time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

SINCE = (1, 32)  # tried; 1.19 aborts on weights that are mapped from a file
CPUINFO = Path("/proc/cpuinfo")
VNNI = {"avx512_vnni", "avx_vnni"}  # as Linux names the instructions; a processor with AMX has the first


def keep_int8_exact(options: Any, version: str, cpuinfo: Path = CPUINFO) -> None:
    """Sets a session's `options` so that int8 products do not saturate, for an ONNX Runtime of this version.

    Processors that are not x86-64 ignore the option. Where `cpuinfo` cannot be read, it is set: exact goes before fast.
    """
    if tuple(int(part) for part in version.split(".")[:2]) >= SINCE and not has_vnni(cpuinfo):
        options.add_session_config_entry("session.x64quantprecision", "1")


def has_vnni(cpuinfo: Path = CPUINFO) -> bool:
    """Whether every processor in `cpuinfo` lists a VNNI instruction set."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    flags = [set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")]
    return bool(flags) and all(VNNI & each for each in flags)
