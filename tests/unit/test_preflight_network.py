"""Which files with a password `edge_runtime check` warns of."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_runtime.preflight.context import Context
from edge_runtime.preflight.network import check_identity
from edge_runtime.settings import Settings
from fedfmsl.common.settings import read_settings


@pytest.mark.parametrize(("mode", "warns"), [(0o644, True), (0o640, True), (0o600, False)])
def test_a_password_that_others_may_read_is_a_note(tmp_path: Path, mode: int, warns: bool) -> None:
    config = tmp_path / "device.toml"
    config.write_text('run = "orchard"\nimages = "."\nbroker = "mqtts://kitchen:secret@fleet.example"\n')
    config.chmod(mode)
    found = list(check_identity(read_settings(Settings, config), Context(tmp_path, config)))
    notes = [each.text for each in found if each.warning]
    assert bool(notes) == warns and not any("secret" in text for text in notes)
