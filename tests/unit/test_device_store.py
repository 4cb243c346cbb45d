"""Which downloaded bundles a device keeps."""

from __future__ import annotations

from pathlib import Path

from edge_runtime.store import DeviceStore


def test_the_present_and_the_previous_bundle_and_that_of_the_model_are_kept(tmp_path: Path) -> None:
    store = DeviceStore(tmp_path)

    def kept(present: str, of_model: str = "") -> set[str]:
        (store.bundles / present).mkdir(parents=True, exist_ok=True)
        (store.bundles / present / "weights").write_bytes(b"x")
        store.keep_bundles(present, of_model)
        return {path.name for path in store.bundles.iterdir() if path.is_dir()}

    assert kept("a") == {"a"}
    assert kept("a") == {"a"}
    assert kept("b") == {"a", "b"}
    assert kept("c") == {"b", "c"}
    assert kept("b") == {"b", "c"}
    assert kept("d", of_model="c") == {"b", "c", "d"}
    assert kept("e") == {"d", "e"}
