"""What a measurement depends on: the processor and the installed libraries."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path

# Of /proc/cpuinfo, those that matrix products use: x86-64, then arm64.
FEATURES = (
    *("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8"),
    *("asimddp", "i8mm", "bf16", "sve"),
)
PACKAGES = ("onnxruntime", "torch", "transformers", "peft")


def describe_machine(threads: int) -> dict[str, object]:
    """Name and features of the processor, the threads used, and versions of packages."""
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    flags = {*fields.get("flags", "").split(), *fields.get("Features", "").split()}
    return {
        "processor": fields.get("model name", platform.machine()),
        "features": [each for each in FEATURES if each in flags],
        "missing_features": [each for each in ("avx512_vnni", "avx512_bf16", "amx_bf16") if each not in flags],
        "threads": threads,
        "packages": {package: version(package) for package in PACKAGES},
    }
