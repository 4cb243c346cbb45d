"""The lock file of a device has the packages of pyproject.toml, in allowed versions, each with hashes."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
LOCK = (ROOT / "devices" / "requirements.txt").read_text()
# each entry: the requirement, and its hashes on continued lines
ENTRIES = [entry.split(" \\\n") for entry in re.split(r"\n(?=\S)", LOCK.strip())]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")


def test_every_entry_has_one_version_and_hashes_and_no_other_option() -> None:
    for requirement, *hashes in ENTRIES:
        assert re.match(r"[a-z0-9-]+==\S+", requirement), requirement
        assert hashes and all(re.fullmatch(r" +--hash=sha256:[0-9a-f]{64}", each) for each in hashes), requirement


@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_has_an_allowed_version_of_every_package(python: str) -> None:
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": "linux",
        "platform_python_implementation": "CPython",
        "implementation_name": "cpython",
    }
    locked: dict[str, str] = {}
    for requirement in (Requirement(entry[0]) for entry in ENTRIES):
        if requirement.marker is None or requirement.marker.evaluate(environment):
            assert requirement.name not in locked, f"two versions of {requirement.name}"
            locked[requirement.name] = next(iter(requirement.specifier)).version
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for text in (*project["dependencies"], *project["optional-dependencies"]["edge"]):
        wanted = Requirement(text)
        if wanted.marker is None or wanted.marker.evaluate(environment):
            version = locked.get(canonicalize_name(wanted.name), "")
            assert wanted.specifier.contains(version), f"{text}: the lock has {version or 'none'}; run make lock"
