"""Who may enter which room (../shared/design.md), and what an edge device has to install."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODELS = {"torch", "transformers", "peft", "optimum", "onnxscript"}
BASE = {"numpy", "pydantic", "pydantic_core", "safetensors"}
SHELL = {"paho", "typer", "rich", "shell"}

# What only other extras than `edge` bring, or have a use for.
NOT_OF_EDGE = {"amqtt", "cryptography", "dp_accounting", "export", "matplotlib", "onnx", "pyarrow", "starlette"}
NOT_OF_EDGE |= {"tokenizers", "trainer_server", "uvicorn", "yaml"}

# What each room may import beside itself and the standard library.
MAY_IMPORT = {
    "protocol": BASE,
    "shell": {"protocol", "pydantic", *SHELL},
    "trainer_server": {"protocol", "starlette", "uvicorn", *BASE, *SHELL},
    "edge_runtime": {"protocol", "onnxruntime", "PIL", "tomli", *BASE, *SHELL},
}
STAND_ALONE = {
    "edge_runtime/metrics.py": "prometheus_client",
    "edge_runtime/personalize.py": "onnx",
    "edge_runtime/texts.py": "tokenizers",
    "trainer_server/privacy.py": "dp_accounting",
}


def imports(path: Path) -> set[str]:
    """The packages that a module imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{path}: relative imports hide which room they lead to"
            found.add(node.module.split(".")[0])
    return found - sys.stdlib_module_names - {"__future__"}


def modules(room: str) -> list[Path]:
    return [path.relative_to(ROOT) for path in sorted((ROOT / room).rglob("*.py"))]


@pytest.mark.parametrize("path", [path for room in MAY_IMPORT for path in modules(room)], ids=str)
def test_a_room_imports_only_what_it_may(path: Path) -> None:
    room = path.parts[0]
    allowed = MAY_IMPORT[room] | {room, STAND_ALONE.get(path.as_posix(), room)}
    assert imports(ROOT / path) - allowed == set()


@pytest.mark.parametrize("path", modules("devices"), ids=str)
def test_a_trials_own_processes_stay_without_torch(path: Path) -> None:
    assert imports(ROOT / path) & {*MODELS, "onnx", "export", "benchmarks", "tests"} == set()


@pytest.mark.parametrize("path", modules("export"), ids=str)
def test_export_knows_nothing_of_server_and_devices(path: Path) -> None:
    assert imports(ROOT / path) & {"trainer_server", "edge_runtime", "devices"} == set()


@pytest.mark.parametrize(
    ("module", "never"),
    [
        ("edge_runtime.__main__", {*MODELS, "onnx", "tokenizers", "export", "trainer_server", "starlette", "uvicorn"}),
        ("edge_runtime.daemon.loop", {*MODELS, "onnx", "tokenizers", "prometheus_client", "export", "trainer_server"}),
        ("trainer_server.__main__", {*MODELS, "onnx", "onnxruntime", "export", "edge_runtime", "PIL"}),
        ("devices.install", {*MODELS, *NOT_OF_EDGE}),
        ("devices.boards", {*MODELS, *NOT_OF_EDGE}),
        ("fedfmsl.protocol.bundle", {*MODELS, "onnx", "onnxruntime", "paho", "shell"}),
    ],
)
@pytest.mark.ort_training
def test_a_process_loads_nothing_of_it_by_detours(module: str, never: set[str]) -> None:
    code = f"import sys, {module}; sys.exit(', '.join({never!r} & set(sys.modules)) or 0)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr


def extras_of(extra: str | None) -> set[str]:
    """The packages that pip installs for an extra, or without any, as far as this project says so itself."""
    found = set()
    for requirement in requires("fedfmsl-edge") or []:
        name = re.match(r"[A-Za-z0-9._-]+", requirement)
        marker = re.search(r"extra == ['\"]([\w-]+)['\"]", requirement)
        if name and (marker[1] if marker else None) in (None, extra):
            found.add(name[0].lower())
    return found


def test_the_edge_extra_lists_neither_torch_nor_what_needs_it() -> None:
    assert extras_of("edge") == {
        *("numpy", "paho-mqtt", "pydantic", "rich", "safetensors", "tomli", "typer"),
        *("onnx", "onnxruntime", "pillow", "prometheus-client"),
    }


def test_the_server_extra_lists_neither_torch_nor_onnxruntime() -> None:
    assert not extras_of("server") & {*MODELS, "onnx", "onnxruntime"}
