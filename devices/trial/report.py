"""The results of a trial: report.json for programs, report.html and report.png for people.

All numbers come from the server's records, the bundle and the evaluation on the fleet's test samples, so equal rounds
give equal reports.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table

from devices.trial.charts import NAMES, ChartData, Point, png
from devices.trial.evaluation import ByModel, FleetEvaluation, last_evaluation
from devices.trial.html_page import Report, coverage, gaps, headline, mean, model_rows, render_page
from fedfmsl.algorithms.evaluation import summarize
from fedfmsl.common.cli import console
from fedfmsl.common.files import write_atomically
from fedfmsl.protocol.messages import EXCHANGE, Round, Stage, Update
from fedfmsl.protocol.task_bundle import TaskBundle
from trainer_server.coordinator.records import ClosedRound, rare_devices, successful_rounds
from trainer_server.storage.run_store import RunStore

DIGITS = 6
SAMPLES = {"image": "photos", "text": "texts"}


def write_report(
    folder: Path,
    evaluation: FleetEvaluation,
    *,
    seed: int,
    alpha: float,
    seconds: dict[str, float],
    used: int,
    skipped: int,
) -> None:
    """Writes report.json, report.html and report.png into the run's folder. `seconds`: "export", "fleet_evaluation"
    and "total". `used`, `skipped`: the number of the user's files.

    Raises RunError if the folder holds no run, or the run has no evaluation.
    """
    rounds = RunStore(folder).rounds.all()
    report = build_report(rounds, TaskBundle.load(folder / "bundle"), evaluation, seed, alpha, seconds)
    report["files"] = _files(folder, report)
    report["used_files"], report["skipped_files"] = used, skipped
    text = json.dumps(report, indent=1, sort_keys=True, ensure_ascii=False)
    write_atomically(folder / "report.json", f"{text}\n".encode())
    data = _chart_data(report, rounds)
    write_atomically(folder / "report.png", png(data))
    write_atomically(folder / "report.html", render_page(folder.name, report, rounds, data).encode())
    _print(folder, report)


def build_report(
    rounds: Sequence[ClosedRound],
    bundle: TaskBundle,
    evaluation: FleetEvaluation,
    seed: int,
    alpha: float,
    seconds: dict[str, float],
) -> Report:
    """The content of report.json, except `files`. Raises RunError if no round has evaluated the models."""
    closed, manifest = last_evaluation(rounds), bundle.manifest
    tested = {name: update for name, update in closed.updates.items() if update.samples}
    stage1, stage2 = successful_rounds(rounds, Stage.GLOBAL), successful_rounds(rounds, Stage.PERSONAL)
    exchanged = [r for r in rounds if r.round.stage in (Stage.GLOBAL, Stage.HEAD, Stage.PERSONAL)]
    devices = {name for r in rounds for name in (*r.updates, *r.missing)}
    counts = Counter(name for r in (*stage1, *stage2) for name in r.updates)
    accuracy = _accuracy(closed, tested)
    rss: dict[str, float] = {}
    for update in (update for r in rounds for update in r.updates.values()):
        rss[update.device] = max(rss.get(update.device, 0.0), round(update.peak_rss_mb, 1))
    return {
        "seed": seed,
        "alpha": alpha,
        "devices": len(devices),
        "classes": len(bundle.classes),
        "class_names": list(bundle.classes),
        "model": manifest.model,
        "samples": SAMPLES[manifest.preprocessing.kind],
        "rounds": {"stage1": len(stage1), "stage2": len(stage2)},
        "seconds": _seconds(rounds, seconds),
        "accuracy": accuracy,
        "missing": {
            "evaluation": sorted(devices - closed.updates.keys()),
            **{model: sorted(tested.keys() - values["per_device"].keys()) for model, values in accuracy.items()},
        },
        "rarely_took_part": rare_devices(counts, len(stage1) + len(stage2), devices, fraction=1.0),
        **_measured(evaluation.devices),
        "unseen": _unseen(evaluation.unseen),
        "accuracy_global_test": {name: _rounded(_balanced(tested, name)) for name in ("start", "global")},
        "test_images": {name: update.samples for name, update in sorted(tested.items())},
        "gate": {
            "mean_local_weight": _rounded(closed.mean("mean_local_weight") or 0.0),
            "entropy": _rounded(closed.mean("gate_entropy") or 0.0),
        },
        "levels": [r.round.level for r in stage1],
        "tuned_share": bundle.tuned_share,
        "tuned_parameters": bundle.tuned_parameters,
        "backbone_parameters": manifest.backbone_parameters,
        "bytes_up_per_device_round": mean(size for r in exchanged for size in r.bytes_up.values()),
        "bytes_down_per_device_round": mean(u.bytes_down for r in exchanged for u in r.updates.values()),
        "engines": sorted({update.engine for r in rounds for update in r.updates.values()} - {""}),
        "device_peak_rss_mb": max(rss.values()),
        "device_peak_rss_mb_per_device": rss,
    }


def _accuracy(closed: ClosedRound, tested: dict[str, Update]) -> Report:
    """For every model that a device has: the mean over all test samples, and each device's accuracy."""
    accuracy = {}
    for model in NAMES:
        mean = closed.mean(model)
        if mean is not None:
            held = {name: update.metrics[model] for name, update in tested.items() if model in update.metrics}
            accuracy[model] = _mean_and_devices(mean, held)
    return accuracy


def _measured(evaluation: ByModel) -> Report:
    """What the devices' models are measured on beside their own test samples, by model (see
    `fedfmsl.algorithms.evaluation`). An accuracy over no samples is null."""
    models = {model: evaluation[model] for model in NAMES if model in evaluation}
    found = {model: summarize([*devices.values()]) for model, devices in models.items()}
    return {
        "accuracy_fleet": {
            model: _mean_and_devices(found[model].fleet, {name: each.fleet for name, each in devices.items()})
            for model, devices in models.items()
        },
        "accuracy_novel": {
            model: _mean_and_devices(found[model].novel, {name: each.novel for name, each in devices.items()})
            for model, devices in models.items()
        },
        "accuracy_stream": {
            model: {f"{share:g}": _rounded(value) for share, value in summary.stream.items()}
            for model, summary in found.items()
        },
        "harmonic": {model: _rounded(summary.harmonic) for model, summary in found.items()},
        "worst_decile": {model: _rounded(summary.worst_decile) for model, summary in found.items()},
    }


def _unseen(evaluation: ByModel) -> Report | None:
    """The same for devices that did not take part, and their accuracy on their own test samples. None without such
    devices."""
    if not evaluation:
        return None
    own = {
        model: _mean_and_devices(summarize([*devices.values()]).own, {name: each.own for name, each in devices.items()})
        for model, devices in evaluation.items()
    }
    return {"accuracy": {model: own[model] for model in NAMES if model in own}, **_measured(evaluation)}


def _mean_and_devices(mean: float | None, per_device: Mapping[str, float | None]) -> Report:
    return {
        "mean": _rounded(mean),
        "per_device": {name: _rounded(value) for name, value in sorted(per_device.items())},
    }


def _balanced(tested: dict[str, Update], model: str) -> float:
    """Class-balanced accuracy: the mean of the classes' recalls."""
    right = [sum(column) for column in zip(*(u.counts[model] for u in tested.values()), strict=True)]
    images = [sum(column) for column in zip(*(u.counts["test"] for u in tested.values()), strict=True)]
    recalls: list[float] = [hits / total for hits, total in zip(right, images, strict=True) if total]
    return sum(recalls) / len(recalls)


def _seconds(rounds: Sequence[ClosedRound], seconds: dict[str, float]) -> dict[str, float]:
    """Per stage, with repeated rounds."""
    names = {
        Stage.STATISTICS: "features",
        Stage.GLOBAL: "stage1",
        Stage.HEAD: "stage1",
        Stage.CANARY: "stage1",
        Stage.PERSONAL: "stage2",
        Stage.BASELINE: "baseline",
        Stage.EVALUATE: "evaluation",
    }

    def part(round_: Round) -> str | None:
        if round_.stage not in (*EXCHANGE, Stage.HOLDERS):
            return names.get(round_.stage)
        first = round_.index < (2 if round_.stage is Stage.UNMASK else 1)  # the secure sums before stage 1
        return names[Stage.STATISTICS if first else Stage.HEAD]

    spent = {name: sum(r.seconds for r in rounds if part(r.round) == name) for name in names.values()}
    return {name: round(value, 1) for name, value in (seconds | spent).items()}


def _files(folder: Path, report: Report) -> Report:
    """Paths of the trained models, relative to the run's folder."""
    personal = {name: f"devices/{name}/personalized.onnx" for name in report["test_images"]}
    return {
        "global_expert": "global_expert",
        "personalized": {name: path for name, path in personal.items() if (folder / path).is_file()},
    }


def _chart_data(report: Report, rounds: Sequence[ClosedRound]) -> ChartData:
    points = [
        Point(
            stage=1 if r.round.stage is Stage.GLOBAL else 2,
            level=r.round.level if r.round.stage is Stage.GLOBAL else r.mean("local_level") or 0.0,
            held_out=r.held_out,
            bytes_up=r.bytes_up,
            bytes_down={name: update.bytes_down for name, update in r.updates.items()},
            seconds=r.seconds,
        )
        for r in (*successful_rounds(rounds, Stage.GLOBAL), *successful_rounds(rounds, Stage.PERSONAL))
    ]
    accuracy = report["accuracy"]
    return ChartData(
        headline=headline(report),
        means={model: values["mean"] for model, values in accuracy.items()},
        novel={model: values["mean"] for model, values in report["accuracy_novel"].items()},
        accuracies={model: values["per_device"] for model, values in accuracy.items()},
        samples=report["samples"],
        tested=report["test_images"],
        points=points,
    )


def _print(folder: Path, report: Report) -> None:
    rows = model_rows(report)
    table = Table(title="Test accuracy of the models", title_justify="left", box=None, pad_edge=False)
    for index, name in enumerate(rows[0]):
        table.add_column(name, justify="right" if index else "left", no_wrap=True)
    for row in rows[1:]:
        table.add_row(*row, style="bold" if row is rows[-1] else "")
    console.print(table)
    for text in (*gaps(report), coverage(report)):
        if text:
            console.print(f"\n{text}")
    console.print(f"\nreport              {folder / 'report.html'}")
    console.print(f"global expert       {folder / report['files']['global_expert']}")
    for path in report["files"]["personalized"].values():
        console.print(f"personalized model  {folder / path}")


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, DIGITS)
