"""What `edge_runtime check` says of the bundle while the daemon runs, and the broker is not asked."""

from __future__ import annotations

from pathlib import Path

from support.bundles import Built

from edge_runtime.preflight.context import Context
from edge_runtime.preflight.training import check_bundle
from edge_runtime.settings import Settings
from edge_runtime.store import DeviceStore
from fedfmsl.common.settings import read_settings


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
