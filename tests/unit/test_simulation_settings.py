"""Settings of the simulator that do not fit together, or do not fit its bundle."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from support.bundles import Built

from fedfmsl.common.settings import SettingsError, read_settings
from fedfmsl.errors import BundleError, ConfigError
from simulation.run import simulate
from simulation.settings import SimulationSettings


def settings(vit: Built, folder: Path, **changes: Any) -> SimulationSettings:
    return SimulationSettings(**{"bundle": vit.bundle.root, "images": folder, **changes})


@pytest.mark.parametrize("name", ["methods", "alpha", "learning_rate"])
def test_an_empty_list_is_refused(name: str, vit: Built, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one value each"):
        settings(vit, tmp_path, **{name: ()})


@pytest.mark.parametrize(
    ("changes", "needed"),
    [
        ({"group_column": "shop", "partition": "natural"}, "--group-column .* --dataset and --partition natural"),
        ({"group_column": "shop", "images": None, "dataset": "a.parquet"}, "--group-column .* --partition natural"),
        ({"label_column": "kind"}, "--label-column .* --dataset"),
        ({"classes_per_device": 3}, "--classes-per-device .* --partition pathological"),
        ({"alpha": "0.1", "partition": "iid"}, "--alpha .* --partition dirichlet or quantity"),
    ],
)
def test_an_option_without_effect_is_refused(changes: dict[str, Any], needed: str, vit: Built, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=needed):
        settings(vit, tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"max_level": 9}, "--max-level 9 is more than 3, the highest level of the bundle"),
        (
            {"level_caps": "1,2", "methods": "fedfmsl,fedit,ditto"},
            "--level-caps has no effect on fedit, ditto, .* it is for fedfmsl, fedfmsl-all-at-once",
        ),
    ],
)
def test_what_bundle_or_method_cannot_do_is_refused(
    changes: dict[str, Any], text: str, vit: Built, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=text):
        simulate(settings(vit, tmp_path, **changes))


def test_a_damaged_bundle_is_refused(vit: Built, tmp_path: Path) -> None:
    root = shutil.copytree(vit.bundle.root, tmp_path / "bundle")
    with (root / "predict-2.onnx").open("ab") as file:
        file.write(b"x")
    with pytest.raises(BundleError, match=r"predict-2\.onnx"):
        simulate(settings(vit, tmp_path, bundle=root))


def test_a_value_instead_of_a_list_in_a_file_is_explained(vit: Built, tmp_path: Path) -> None:
    (tmp_path / "simulation.toml").write_text(f'bundle = "{vit.bundle.root}"\nimages = "."\nalpha = 0.5\n')
    with pytest.raises(SettingsError, match=r"toml:3: alpha = 0\.5 is not a list; write \[0\.5\]"):
        read_settings(SimulationSettings, tmp_path / "simulation.toml", environment=False)
