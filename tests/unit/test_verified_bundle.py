"""A device reads the files of its bundle again only if one of them may have changed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from support.bundles import Built
from support.opened_files import opened_below

from edge_runtime.store.verified_bundle import verify_if_changed
from fedfmsl.errors import BundleError
from fedfmsl.protocol.bundle import Bundle


@pytest.fixture
def bundle(vit: Built, tmp_path: Path) -> Bundle:
    return Bundle.load(shutil.copytree(vit.bundle.root, tmp_path / "bundle"))


def test_an_unchanged_bundle_is_read_once(bundle: Bundle, tmp_path: Path) -> None:
    record = tmp_path / "verified.json"
    with opened_below(bundle.root) as first:
        verify_if_changed(bundle, record)
    assert len(first) == len(bundle.manifest.files)
    with opened_below(bundle.root) as again:
        verify_if_changed(bundle, record)
    assert not again
    record.write_text("{")  # damaged
    with opened_below(bundle.root) as again:
        verify_if_changed(bundle, record)
    assert len(again) == len(first)


def test_a_file_of_the_same_size_and_date_is_read_again(bundle: Bundle, tmp_path: Path) -> None:
    record, path = tmp_path / "verified.json", bundle.path("backbone.weights")
    verify_if_changed(bundle, record)
    status, content = path.stat(), bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    for _ in range(2):  # an altered bundle is not recorded
        with pytest.raises(BundleError, match=r"backbone\.weights has been altered"):
            verify_if_changed(bundle, record)
    path.unlink()
    with pytest.raises(BundleError, match=r"backbone\.weights is missing"):
        verify_if_changed(bundle, record)
