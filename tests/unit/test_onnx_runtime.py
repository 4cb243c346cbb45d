"""The ONNX Runtime option for exact int8 products, which are slower."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedfmsl.common.onnx_runtime import has_vnni, keep_int8_exact


class Options:
    def __init__(self) -> None:
        self.entries: dict[str, str] = {}

    def add_session_config_entry(self, key: str, value: str) -> None:
        self.entries[key] = value


def cpuinfo(folder: Path, *flags: str) -> Path:
    path = folder / "cpuinfo"
    path.write_text("".join(f"processor\t: {i}\nflags\t\t: {each}\n\n" for i, each in enumerate(flags)))
    return path


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["fpu avx2"] * 2, False),
        (["fpu avx2 avx512f"] * 2, False),
        (["avx2 avx_vnni"] * 2, True),
        (["avx512f avx512_vnni amx_int8"] * 2, True),
        (["avx512_vnni", "avx2"], False),
        ([], False),
    ],
)
def test_vnni_is_read_from_the_flags_of_every_processor(tmp_path: Path, flags: list[str], expected: bool) -> None:
    assert has_vnni(cpuinfo(tmp_path, *flags)) is expected


@pytest.mark.parametrize(
    ("flags", "version", "entries"),
    [
        ("avx2", "1.32.0", {"session.x64quantprecision": "1"}),
        ("avx2", "1.31.1", {}),
        ("avx2 avx_vnni", "1.32.0", {}),
    ],
)
def test_exact_products_are_selected_only_without_vnni(
    tmp_path: Path, flags: str, version: str, entries: dict[str, str]
) -> None:
    options = Options()
    keep_int8_exact(options, version, cpuinfo(tmp_path, flags))
    assert options.entries == entries


def test_without_processor_flags_products_are_exact(tmp_path: Path) -> None:
    options = Options()
    keep_int8_exact(options, "1.32.0", tmp_path / "absent")
    assert options.entries == {"session.x64quantprecision": "1"}
