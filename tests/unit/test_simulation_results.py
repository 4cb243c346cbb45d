"""Measured rows, tables of a simulation, and the setting that it recommends."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomlkit
from support.bundles import Built
from support.samples import CLASSES, write_device_photos

from edge_runtime.data.samples import labels_of
from edge_runtime.training.context import Samples, TrainingContext
from fedfmsl.algorithms.arrays import Floats
from fedfmsl.algorithms.class_means import SCALE
from fedfmsl.algorithms.discriminant import OVERCONFIDENCE, SHRINKAGE
from fedfmsl.algorithms.evaluation import SHARES, STREAM_SEED
from fedfmsl.algorithms.label_shift import CLASS_STRENGTH, ITERATIONS, MIN_SAMPLES, RATE_STRENGTH, WINDOW
from fedfmsl.algorithms.mixture import LOCAL_SHARE, NOVEL_RATE, SMOOTHING
from simulation.charts import labels_by_device
from simulation.fleet import Fleet, open_folders
from simulation.measure import held_out_accuracy, measure
from simulation.methods.base import STAGE2_SHARE, Method, MethodSettings, RoundCost
from simulation.report import server_settings, write_report
from simulation.results import as_csv, as_markdown, spread
from simulation.run import NUMERICS, TEST_SHARE
from simulation.settings import SimulationSettings
from trainer_server.config import STAGE2


class Constant(Method[int, int]):
    """Always predicts the class of the model; the row `right` predicts the labels. The row `unsure` takes half of the
    apples for lemons, and adapts."""

    name = title = source = "constant"
    adapting = ("unsure",)

    def start(self, fleet: Fleet, settings: MethodSettings) -> tuple[int, RoundCost]:
        return 0, RoundCost()

    def round(self, fleet: Fleet, state: int, devices: Sequence[str], index: int) -> tuple[int, RoundCost]:
        return state, RoundCost()

    def adapt(self, fleet: Fleet, state: int, devices: Sequence[str]) -> int:
        return state

    def model(self, state: int, device: str) -> int:
        return state

    def log_p(self, context: TrainingContext, model: int, samples: Samples) -> dict[str, Floats]:
        labels = labels_of(samples)
        rows = {"constant": np.full(len(samples), model), "right": labels}
        p = {row: np.eye(context.classes, dtype=np.float32)[found] + 1e-6 for row, found in rows.items()}
        p["unsure"] = p["right"].copy()
        p["unsure"][np.flatnonzero(labels == 0)[::2]] = (0.47, 0.02, 0.49, 0.02)
        return {row: np.log(values) for row, values in p.items()}


def test_rows_are_measured_on_own_fleet_and_novel_samples(vit: Built, tmp_path: Path) -> None:
    # device-0 holds apple and kiwi, device-1 kiwi and lemon; twelve test photos of each of its classes
    held = {"device-0": CLASSES[:2], "device-1": CLASSES[1:3]}
    for seed, (name, classes) in enumerate(held.items()):
        for split, count in (("train", 4), ("test", 12)):
            write_device_photos(tmp_path / name / split, dict.fromkeys(classes, count), 10 * seed + (split == "test"))
    fleet = open_folders(vit.bundle, [tmp_path / name for name in held], tmp_path / "s", tmp_path / "c", threads=1)
    rows = measure(Constant(), fleet, 0, fleet.names, test_devices=2)
    apple = rows["constant"]
    assert (apple["own"], apple["fleet"], apple["novel"]) == (1 / 4, 1 / 4, 1 / 2)
    assert apple["worst_decile"] == 0
    assert rows["right"]["own"] == rows["right"]["novel"] == rows["right"]["harmonic"] == 1
    one = measure(Constant(), fleet, 0, fleet.names, test_devices=1)["constant"]
    assert (one["own"], one["fleet"], one["novel"]) == (1 / 4, 1 / 4, 0)  # device-0, to which lemon is novel
    # a device adapts to its own samples whether or not it is measured on those of the others
    both, last = (measure(Constant(), fleet, 0, ["device-1", "device-0"], count)["unsure"] for count in (2, 1))
    assert both["own"] == last["own"] == 7 / 8
    assert min(both["stream"][0.0], last["stream"][0.0]) > 7 / 8
    assert held_out_accuracy(Constant(), fleet, 0) == {"constant": 1 / 4, "right": 1.0, "unsure": 3 / 4}


def result(
    rate: float, seed: int, own: float, held_out: float, method: str = "fedfmsl", alpha: float = 0.5
) -> dict[str, Any]:
    row = {"own": own, "novel": 0.5, "fleet": None, "stream": {"0.1": 0.7}, "harmonic": 0.4, "worst_decile": 0.1}
    cell = {"method": method, "alpha": alpha, "learning_rate": rate, "seed": seed}
    costs = {"kilobytes_up": 10.0, "kilobytes_down": 20.0, "device_seconds": 1.5}
    rows = {"rows": {method: row}, "held_out": {method: held_out}, "unseen": {}, "unseen_adapted": {method: row}}
    return {**cell, **costs, **rows}


RESULTS = [
    result(0.001, 0, 0.9, 0.6),
    result(0.001, 1, 0.9, 0.6),
    result(0.002, 0, 0.5, 0.7),
    result(0.002, 1, 0.7, 0.9),
]


def test_a_row_is_the_mean_over_the_seeds() -> None:
    lines = as_markdown(RESULTS).splitlines()
    assert len(lines) == 4
    assert "| fedfmsl | fedfmsl | 0.5 | 0.002 | 2 | 0.600 ± 0.141 | 0.500 ± 0.000 |  | 0.700 ± 0.000 |" in lines[3]
    assert len(as_csv(RESULTS).splitlines()) == 5
    assert spread([0.25], ".2f") == "0.25"
    assert spread([None], ".2f") == ""


def test_names_of_classes_are_text_in_charts_in_any_script() -> None:
    names = ["a$^$b", "りんご", "शलजम", "plum"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chart = labels_by_device(np.ones((2, 4), np.int64), names).decode()
    assert chart.startswith("<?xml")
    assert all(f">{name}</text>" in chart for name in names)


def test_the_recommended_setting_is_the_best_on_held_out_samples(tmp_path: Path) -> None:
    bundle = tmp_path / 'a "b"'
    settings = SimulationSettings(bundle=bundle, images=tmp_path, devices=9, fraction=0.5)
    text = server_settings([*RESULTS, result(0.1, 0, 1.0, 1.0, method="fedit")], settings)
    assert "learning_rate = 0.002\n" in text
    assert 'select = "random"\nfraction = 0.5\n' in text
    assert tomlkit.parse(text)["bundle"] == str(bundle)
    assert server_settings([result(0.1, 0, 1.0, 1.0, method="fedit")], settings) == ""
    of_other_alpha = [result(0.001, 0, 0.9, 0.62, alpha=0.1), result(0.002, 0, 0.9, 0.58, alpha=0.1)]
    assert "learning_rate = 0.002\n" in server_settings([*RESULTS, *of_other_alpha], settings)


def test_a_changed_constant_needs_other_numerics() -> None:
    """Results of another value would be taken for results of this one. After a change, raise NUMERICS too."""
    constants = {
        "numerics": NUMERICS,
        "stage 2": (STAGE2.epochs, STAGE2.learning_rate, STAGE2.weight_decay, STAGE2_SHARE),
        "class means": SCALE,
        "head": (SHRINKAGE, OVERCONFIDENCE),
        "mixture": (SMOOTHING, NOVEL_RATE, LOCAL_SHARE),
        "adaptation": (RATE_STRENGTH, CLASS_STRENGTH, MIN_SAMPLES, ITERATIONS, WINDOW),
        "streams": (SHARES, STREAM_SEED),
        "test split": TEST_SHARE,
    }
    assert constants == {
        "numerics": 1,
        "stage 2": (1, 1e-4, 0.01, 5 / 17),
        "class means": 20.0,
        "head": (1 / 3, 12.0),
        "mixture": (0.1, 0.2, 0.5),
        "adaptation": (10.0, 1000.0, 10, 20, 1000),
        "streams": ((0.0, 0.1, 0.5), 0),
        "test split": 0.2,
    }


def test_the_report_leaves_no_file_of_an_earlier_one(
    vit: Built, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = SimulationSettings(bundle=vit.bundle.root, images=tmp_path)
    for results in (RESULTS, [result(0.1, 0, 1.0, 1.0, method="fedit")]):
        write_report(tmp_path, results, settings, CLASSES, lambda: np.ones((2, 4), np.int64), "39 of 40 were used")
    assert "<p>39 of 40 were used</p>" in (tmp_path / "report.html").read_text()
    written = {"results.csv", "results.md", "labels.svg", "accuracy.svg", "report.html"}
    assert {path.name for path in tmp_path.iterdir()} == written
    printed = capsys.readouterr().out
    assert "0.600 ± 0.141" in printed and "|" not in printed
