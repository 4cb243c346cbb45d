"""Facts about the installed ONNX Runtime: its int8 products, and whether it is onnxruntime-training.

onnxruntime-training is another distribution of the Python package `onnxruntime`. Only one of them is importable.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fedfmsl.errors import ConfigError

EXACT_INT8_SINCE = (1, 32)  # tested; 1.19 aborts on weights that are mapped from a file
CPUINFO = Path("/proc/cpuinfo")
VNNI = {"avx512_vnni", "avx_vnni"}  # Linux names; a processor with AMX has the first
INSTALL = "pip install --no-deps --target ort-training onnxruntime-training-cpu==1.19.2"


def keep_int8_exact(options: Any, version: str, cpuinfo: Path = CPUINFO) -> None:
    """Sets the session `options` so that int8 products do not saturate, for ONNX Runtime `version`.

    With signed weights, int8 products saturate on x86-64 processors without VNNI. ONNX Runtime can use unsigned
    weights there, which are exact but slower. With VNNI, signed weights are exact, and a training step at level 2 takes
    half the time. If `cpuinfo` cannot be read, the option is set. Other architectures ignore it.
    """
    if tuple(int(part) for part in version.split(".")[:2]) >= EXACT_INT8_SINCE and not has_vnni(cpuinfo):
        options.add_session_config_entry("session.x64quantprecision", "1")


def has_vnni(cpuinfo: Path = CPUINFO) -> bool:
    """Whether every processor in `cpuinfo` lists a VNNI instruction set."""
    return every_processor_has(VNNI, cpuinfo)


def every_processor_has(names: set[str], cpuinfo: Path = CPUINFO) -> bool:
    """Whether every processor in `cpuinfo` lists one of the instruction sets `names`; False if it cannot be read."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    flags = [set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")]
    return bool(flags) and all(names & each for each in flags)


def has_ort_training() -> bool:
    """Whether the importable `onnxruntime` is onnxruntime-training. Does not import it."""
    spec = find_spec("onnxruntime")
    return bool(spec and spec.origin and (Path(spec.origin).parent / "training").is_dir())


def require_ort_training(option: str) -> None:
    """Raises ConfigError if onnxruntime-training, which `option` needs, is not installed."""
    if not has_ort_training():
        raise ConfigError(
            f"{option} needs onnxruntime-training (x86-64, Python 3.12 or older): {INSTALL}; "
            "then run the command again with PYTHONPATH=ort-training, because the standard package has the same name"
        )
