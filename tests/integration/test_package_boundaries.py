"""Which package may import what, and what the extras install.

`TABLE` lists the packages from the lowest to the highest. A package may import itself, packages below it that its row
names, and the third-party packages that its row names.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
ROOTS = ("fedfmsl", "export", "trainer_server", "edge_runtime", "devices", "simulation", "benchmarks")
MODELS = {"torch", "transformers", "peft", "optimum", "onnxscript"}  # what an export needs
SERVER_ONLY = {"trainer_server"}
EXPORT_ONLY = {*MODELS, "export", "huggingface_hub"}


@dataclass(frozen=True)
class Row:
    package: str
    internal: str = ""
    external: str = ""


ALGORITHMS, COMMON, PROTOCOL, TRANSPORT = (
    f"fedfmsl.{name}" for name in ("algorithms", "common", "protocol", "transport")
)
FEDFMSL = f"fedfmsl.errors {ALGORITHMS} {COMMON} {PROTOCOL} {TRANSPORT}"
EDGE = "edge_runtime"
TABLE = (
    Row("fedfmsl.errors"),
    Row(ALGORITHMS, "", "numpy cryptography Crypto"),
    Row(COMMON, "fedfmsl.errors", "typer rich pydantic pydantic_core pydantic_settings tomli"),
    Row(PROTOCOL, f"fedfmsl.errors {ALGORITHMS}", "numpy pydantic safetensors"),
    Row(TRANSPORT, f"fedfmsl.errors {COMMON} {PROTOCOL}", "paho pydantic cryptography"),
    Row("fedfmsl.web", f"fedfmsl.errors {COMMON} {TRANSPORT}", "jinja2 starlette uvicorn"),
    Row("fedfmsl", f"fedfmsl.errors {ALGORITHMS} {PROTOCOL}"),
    Row(
        "export",
        f"fedfmsl.errors {ALGORITHMS} {COMMON} {PROTOCOL}",
        "torch transformers peft optimum huggingface_hub requests onnx onnxruntime tokenizers safetensors numpy rich "
        "typer",
    ),
    Row("trainer_server.defaults"),
    Row("trainer_server.config", f"{FEDFMSL} trainer_server.defaults", "pydantic pydantic_settings"),
    Row("trainer_server.coordinator", f"{FEDFMSL} trainer_server.config", "numpy"),
    Row(
        "trainer_server.storage",
        f"{FEDFMSL} trainer_server.config trainer_server.coordinator",
        "numpy pydantic safetensors",
    ),
    Row(
        "trainer_server.tracking",
        f"{FEDFMSL} trainer_server.config trainer_server.coordinator trainer_server.storage",
    ),
    Row(
        "trainer_server.service",
        f"{FEDFMSL} trainer_server.config trainer_server.coordinator trainer_server.storage trainer_server.tracking",
        "paho",
    ),
    Row(
        "trainer_server.console",
        f"{FEDFMSL} fedfmsl.web trainer_server.config trainer_server.coordinator trainer_server.storage "
        "trainer_server.service",
        "pydantic starlette",
    ),
    Row("trainer_server", f"{FEDFMSL} trainer_server.*", "typer rich pydantic pydantic_settings"),
    Row(f"{EDGE}.store", FEDFMSL, "pydantic"),
    Row(f"{EDGE}.engines", FEDFMSL, "numpy onnxruntime psutil"),
    Row(f"{EDGE}.data", f"{FEDFMSL} {EDGE}.store {EDGE}.engines", "numpy PIL pydantic"),
    Row(f"{EDGE}.labelling", f"{FEDFMSL} {EDGE}.data", "numpy"),
    Row(f"{EDGE}.training", f"{FEDFMSL} {EDGE}.store {EDGE}.engines {EDGE}.data", "numpy pydantic"),
    Row(
        f"{EDGE}.resources",
        f"{FEDFMSL} {EDGE}.store {EDGE}.engines {EDGE}.data {EDGE}.training",
        "numpy pydantic pydantic_core psutil",
    ),
    Row(f"{EDGE}.settings", f"{FEDFMSL} {EDGE}.resources", "pydantic pydantic_settings"),
    Row(
        f"{EDGE}.inference",
        f"{FEDFMSL} {EDGE}.store {EDGE}.engines {EDGE}.data {EDGE}.labelling {EDGE}.training {EDGE}.settings",
        "numpy pydantic",
    ),
    Row(
        f"{EDGE}.daemon",
        f"{FEDFMSL} {EDGE}.store {EDGE}.engines {EDGE}.data {EDGE}.training {EDGE}.resources {EDGE}.settings "
        f"{EDGE}.inference",
        "numpy paho pydantic psutil",
    ),
    Row(
        f"{EDGE}.page",
        f"{FEDFMSL} fedfmsl.web {EDGE}.store {EDGE}.engines {EDGE}.data {EDGE}.labelling {EDGE}.settings {EDGE}.daemon",
        "starlette",
    ),
    Row(EDGE, f"{FEDFMSL} {EDGE}.*", "typer rich pydantic"),
    Row(
        "devices.provisioning",
        f"{FEDFMSL} fedfmsl.web {EDGE}.settings {EDGE}.resources",
        "cryptography pydantic starlette tomli tomlkit",
    ),
    Row(
        "devices.trial",
        f"{FEDFMSL} trainer_server.* {EDGE}.store {EDGE}.engines {EDGE}.data {EDGE}.training {EDGE}.settings",
        "amqtt matplotlib numpy pyarrow pydantic rich typer",
    ),
    Row("devices", f"{FEDFMSL} devices.provisioning {EDGE}.settings", "typer rich"),
    Row(
        "simulation",
        f"fedfmsl {FEDFMSL} trainer_server.* {EDGE} {EDGE}.* devices.trial",
        "matplotlib numpy pyarrow pydantic rich typer",
    ),
    Row("fedfmsl.__main__", f"fedfmsl {COMMON}", "typer"),  # it imports the other commands by name at run time
    Row("benchmarks", " ".join(f"{root} {root}.*" for root in ROOTS[:-1]), "*"),
)
# Optional dependencies: only this module may import them.
OPTIONAL = {
    "fedfmsl.common.scatter": {"matplotlib", "numpy"},
    "edge_runtime.daemon.metrics": {"prometheus_client"},
    "fedfmsl.transport.metrics": {"prometheus_client"},
    "trainer_server.service.metrics": {"prometheus_client"},
    "trainer_server.tracking.sinks": {"tensorboardX", "mlflow", "wandb"},
    "edge_runtime.data.images": {"pillow_heif"},
    "edge_runtime.data.texts": {"tokenizers"},
    "edge_runtime.engines.openvino": {"openvino"},
    "edge_runtime.inference.export_onnx": {"onnx"},
    "edge_runtime.inference.model_folder": {"onnx"},
    "simulation.datasets": {"datasets"},
    "simulation.ray_fleet": {"ray"},
    "simulation.methods.dual_lora": {"onnx"},
}


@cache
def modules() -> dict[str, Path]:
    """All modules of the project by name. A package is named without `__init__`."""
    found = {}
    for root in ROOTS:
        for path in sorted((ROOT / root).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports(module: str) -> frozenset[str]:
    """Modules of this project by full name, others by their top-level name. Imports in functions count."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(modules()[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{module}: use absolute imports"
            names |= {_module_of(node.module, alias.name) for alias in node.names}
    tops = {name if name in modules() else name.split(".")[0] for name in names}
    return frozenset(tops - sys.stdlib_module_names - {"__future__"})


def _module_of(package: str, name: str) -> str:
    return f"{package}.{name}" if f"{package}.{name}" in modules() else package


def row_of(module: str) -> Row:
    """The row of the longest package name that contains the module."""
    return max((row for row in TABLE if _within(module, row.package)), key=lambda row: len(row.package))


def _within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def allowed(row: Row, imported: str) -> bool:
    if imported not in modules():
        return row.external == "*" or imported in row.external.split()
    target = row_of(imported).package
    return target == row.package or any(
        target == name or (name.endswith(".*") and _within(target, name[:-2])) for name in row.internal.split()
    )


@pytest.mark.parametrize("package", [row.package for row in TABLE])
def test_a_package_imports_only_what_its_row_names(package: str) -> None:
    row = next(row for row in TABLE if row.package == package)
    members = [module for module in modules() if row_of(module) is row]
    assert members, f"{package} has no modules; remove its row"
    wrong = {
        f"{module} imports {name}"
        for module in members
        for name in imports(module) - OPTIONAL.get(module, set())
        if not allowed(row, name)
    }
    assert not wrong


def test_every_row_names_only_packages_below_it() -> None:
    packages = [row.package for row in TABLE]
    for index, row in enumerate(TABLE):
        for name in row.internal.split():
            assert name.removesuffix(".*") in packages[:index] or name.endswith(".*"), f"{row.package}: {name}"
    for module in modules():
        own = packages.index(row_of(module).package)
        for name in imports(module) & modules().keys():
            assert packages.index(row_of(name).package) <= own, f"{module} imports {name}, which is above it"


def test_no_two_modules_import_each_other() -> None:
    graph = {module: imports(module) & modules().keys() - {module} for module in modules()}
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError with the cycle


def test_nothing_imports_benchmarks_or_tests() -> None:
    for module in modules():
        if row_of(module).package != "benchmarks":
            assert not {name for name in imports(module) if name.split(".")[0] in ("benchmarks", "tests", "support")}


@pytest.mark.parametrize(
    ("module", "never"),
    [
        ("fedfmsl", {"pydantic", "safetensors", "onnxruntime", "torch", "paho", "typer"}),
        ("fedfmsl.protocol.bundle", {*EXPORT_ONLY, "onnx", "onnxruntime", "paho", "typer"}),
        *(
            (module, {*EXPORT_ONLY, *SERVER_ONLY, "onnx", "onnxruntime", "tokenizers", "PIL", "paho", "psutil", "rich"})
            for module in ("edge_runtime.commands", "edge_runtime.daemon.status")
        ),
        (
            "edge_runtime.daemon.loop",
            {
                *EXPORT_ONLY,
                *SERVER_ONLY,
                "onnx",
                "tokenizers",
                "prometheus_client",
                "starlette",
                "Crypto",
                "cryptography",
            },
        ),
        ("edge_runtime.page.service", {*EXPORT_ONLY, *SERVER_ONLY, "onnx", "onnxruntime", "tokenizers", "paho"}),
        ("edge_runtime.engines.step_graph", {*EXPORT_ONLY, *SERVER_ONLY, "onnx", "paho", "typer"}),
        (
            "trainer_server.commands",
            {*EXPORT_ONLY, "onnx", "onnxruntime", "edge_runtime", "PIL", "rich", "starlette", "uvicorn", "jinja2"},
        ),
        ("devices.install", {*EXPORT_ONLY, *SERVER_ONLY, "amqtt", "matplotlib", "onnx", "pyarrow", "tokenizers"}),
        ("devices.boards", {*EXPORT_ONLY, *SERVER_ONLY, "amqtt", "matplotlib", "onnx", "pyarrow", "tokenizers"}),
    ],
)
def test_a_process_does_not_load_what_it_does_not_need(module: str, never: set[str]) -> None:
    code = f"import sys, {module}; sys.exit(', '.join({never!r} & set(sys.modules)) or 0)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr


def distributions_of(extra: str) -> set[str]:
    """The distributions that pip installs for the package with this extra, as far as pyproject.toml names them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed = [*project["dependencies"], *project["optional-dependencies"][extra]]
    return {re.split(r"[^A-Za-z0-9-]", requirement)[0].lower() for requirement in listed}


def test_the_edge_extra_installs_neither_torch_nor_what_needs_it() -> None:
    assert distributions_of("edge") == {
        *("numpy", "paho-mqtt", "pydantic", "pydantic-settings", "rich", "safetensors", "tomli", "typer"),
        *("cryptography", "psutil", "pycryptodome", "tomlkit"),
        *("onnx", "onnxruntime", "pillow", "prometheus-client"),
        *("jinja2", "starlette", "uvicorn"),
    }


def test_the_server_extra_installs_neither_torch_nor_onnxruntime() -> None:
    assert not distributions_of("server") & {*MODELS, "onnx", "onnxruntime"}
