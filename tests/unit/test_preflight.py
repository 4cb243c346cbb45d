"""What `edge_runtime check` finds without a broker."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.bundles import Built

from edge_runtime import preflight
from edge_runtime.preflight.context import Context, Finding
from edge_runtime.preflight.training import check_bundle
from edge_runtime.settings import Settings
from edge_runtime.store import DeviceStore
from fedfmsl.common.settings import read_settings
from fedfmsl.errors import InputError


def test_a_downloaded_bundle_is_known_before_the_first_measurement(vit: Built, tmp_path: Path) -> None:
    store = DeviceStore(tmp_path)
    settings = read_settings(Settings, flags={"run": "orchard", "images": tmp_path, "state": tmp_path})
    (found,) = check_bundle(settings, Context(tmp_path, running=True))
    assert found.text.startswith("none yet") and not found.warning
    store.bundles.mkdir()
    (store.bundles / vit.bundle.sha256).symlink_to(vit.bundle.root)
    store.keep_bundles(vit.bundle.sha256)
    (found,) = check_bundle(settings, Context(tmp_path, running=True))
    assert found.text.endswith("checksums OK")


def test_a_file_that_may_not_be_read_is_a_finding_and_later_checks_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(settings: Settings, context: Context) -> Iterator[Finding]:
        yield Finding("before", "")
        raise PermissionError(13, "Permission denied", "photos")

    def later(settings: Settings, context: Context) -> Iterator[Finding]:
        yield Finding("after", "")

    monkeypatch.setattr(preflight, "CHECKS", {"samples": denied, "governor": later})
    settings = read_settings(Settings, flags={"run": "orchard", "images": tmp_path, "state": tmp_path})
    before, found, after = preflight.run_preflight(settings)
    assert (before.name, found.name, after.name) == ("before", "samples", "after")
    assert found.code == InputError.exit_code and found.text.startswith("photos: no permission to use it")
