"""Bundles on disk, and PEFT's names of their trainables."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.bundles import Built, random_theta

from fedfmsl.errors import BundleError
from fedfmsl.protocol.bundle import MAX_MANIFEST_BYTES, Bundle
from fedfmsl.protocol.peft_names import from_peft, to_peft


@pytest.mark.parametrize("damage", ["changed", "shortened", "missing"])
def test_verify_names_the_file_that_is_missing_or_changed(vit: Built, tmp_path: Path, damage: str) -> None:
    vit.bundle.verify()
    root = shutil.copytree(vit.bundle.root, tmp_path / "copy")
    for name in vit.bundle.manifest.files:
        path, data = root / name, (root / name).read_bytes()
        path.unlink()
        if damage != "missing":
            path.write_bytes(data[:-1] + (bytes([data[-1] ^ 1]) if damage == "changed" else b""))
        with pytest.raises(BundleError, match=name):
            Bundle.load(root).verify()
        path.write_bytes(data)
    Bundle.load(root).verify()


def test_every_file_of_a_bundle_has_the_mode_of_a_new_file(built: Built, tmp_path: Path) -> None:
    """So that the user of a service can read what an administrator built."""
    (tmp_path / "new").touch()
    (mode,) = {path.stat().st_mode for path in built.bundle.root.iterdir()}
    assert mode == (tmp_path / "new").stat().st_mode


def test_a_file_of_another_user_is_one_clear_error(vit: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *arguments: Any, **options: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))  # root may read every file, so modes do not show it

    bundle = vit.bundle
    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(Path, "read_bytes", refuse)
    for read in (lambda: Bundle.load(bundle.root), bundle.verify, bundle.initial):
        with pytest.raises(BundleError, match=r"no permission to read it as user \d+; change its owner or its mode"):
            read()


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\xff", b'{"schema_version": 3}'])
def test_a_folder_without_a_valid_manifest_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(BundleError, match=r"export\.build"):
        Bundle.load(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"files": {"../secret": {"size": 1, "sha256": "0" * 64}}},
        {"files": {"a\0b": {"size": 1, "sha256": "0" * 64}}},
        {"files": {"": {"size": 1, "sha256": "0" * 64}}},
        {"files": {"a": {"size": -1, "sha256": "0" * 64}}},
        {"files": {"a": {"size": 1, "sha256": "../x"}}},
        {"levels": 2},
        {"gate_layout": []},
        {"lora_layout": []},
        {"backbone_parameters": 0},
        {"model": "m" * MAX_MANIFEST_BYTES},
    ],
    ids=lambda change: str(change)[:40],
)
def test_an_inconsistent_manifest_is_refused(vit: Built, tmp_path: Path, change: dict[str, Any]) -> None:
    manifest = vit.bundle.manifest.model_dump(mode="json")
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, **change}))
    with pytest.raises(BundleError, match=r"export\.build"):
        Bundle.load(tmp_path)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd"])
def test_a_manifest_cannot_name_files_outside_the_bundle(vit: Built, name: str) -> None:
    with pytest.raises(BundleError, match="outside the bundle"):
        vit.bundle.path(name)


def test_the_features_key_depends_on_weights_and_preprocessing(vit: Built, dinov2: Built, tmp_path: Path) -> None:
    root = shutil.copytree(vit.bundle.root, tmp_path / "copy")
    manifest = (root / "manifest.json").read_text()
    assert Bundle.load(root).features_key == vit.bundle.features_key != dinov2.bundle.features_key
    (root / "manifest.json").write_text(manifest.replace('"mean": [\n   0.5', '"mean": [\n   0.25'))
    assert Bundle.load(root).features_key != vit.bundle.features_key


def test_from_peft_is_the_inverse_of_to_peft(built: Built) -> None:
    bundle, spec = built.bundle, built.bundle.manifest.peft
    theta = random_theta(bundle, bundle.manifest.levels, 0)
    renamed = to_peft(spec, bundle.expert.split(theta))
    assert all(name.startswith("base_model.model.") for name in renamed)
    assert renamed["base_model.model.classifier.weight"].shape == (4, spec.classifier_width)
    assert np.array_equal(bundle.expert.join(from_peft(spec, renamed)), theta)
