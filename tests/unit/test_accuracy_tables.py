"""The tables and the picture that `benchmarks.accuracy` makes of several trials."""

from __future__ import annotations

import io
from typing import Any

from PIL import Image

from benchmarks.accuracy import own_against_novel, tables


def report(seed: int, own: float, novel: float | None) -> dict[str, Any]:
    """Of two models with equal accuracies."""

    def of_both(value: Any) -> dict[str, Any]:
        return {"global": value, "mofm": value}

    return {
        "seed": seed,
        "samples": "photos",
        "accuracy": of_both({"mean": own}),
        "accuracy_novel": of_both({"mean": novel}),
        "accuracy_fleet": of_both({"mean": 0.5}),
        "accuracy_stream": of_both({"0": own} if novel is None else {"0": own, "0.1": 0.6, "0.5": 0.55}),
        "harmonic": of_both(None if novel is None else 0.6),
        "worst_decile": of_both(0.4),
        "gate": {"mean_local_weight": 0.5},
        "seconds": {"features": 10.0, "stage1": 20.0, "stage2": 30.0},
    }


def test_a_row_per_model_has_means_and_spread_over_the_seeds() -> None:
    lines = tables([report(0, 0.7, 0.4), report(1, 0.8, 0.6)])
    assert lines[0].startswith("| model | own | novel | fleet | harmonic | worst decile | stream 10% | stream 50% |")
    assert lines[3].startswith("| MoFM | 0.750 ± 0.071 | 0.500 ± 0.141 | 0.500 ± 0.000 |")
    assert "| seed 1 | 0.800 / 0.600 | 0.800 / 0.600 |" in lines
    assert any("60 s" in line for line in lines)


def test_a_seed_without_novel_samples_is_left_out_of_novel() -> None:
    lines = tables([report(0, 0.7, 0.4), report(1, 0.8, None)])
    assert lines[2].startswith("| global | 0.750 ± 0.071 | 0.400 | ")
    assert "| seed 1 | 0.800 / – | 0.800 / – |" in lines
    assert tables([report(0, 0.7, None)])[2].startswith("| global | 0.700 | – | 0.500 | – |")


def test_the_picture_is_a_png() -> None:
    for reports in ([report(0, 0.7, 0.4), report(1, 0.8, 0.6)], [report(0, 0.7, None)]):
        assert Image.open(io.BytesIO(own_against_novel(reports))).size == (1200, 750)
