"""What came out of a run: report.json for programs, report.html and report.png for people.

Everything is read from the run's folder (the server's records and the bundle), so the same rounds give the same
report.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from devices.trial.figures import NAMES, Point, Shown, png, svgs
from fedfmsl.common.cli import console
from fedfmsl.common.files import write_atomically
from fedfmsl.errors import RunError
from fedfmsl.protocol.bundle import Bundle, Manifest
from fedfmsl.protocol.messages import Stage, Update
from trainer_server.coordinator.records import ClosedRound, successful_rounds
from trainer_server.storage.run_store import RunStore

DIGITS = 6
SAMPLES = {"image": "photos", "text": "texts"}

Report = dict[str, Any]


def write_report(folder: Path, *, seed: int, alpha: float, seconds: dict[str, float]) -> None:
    """Writes report.json, report.html and report.png into the run's folder. `seconds`: what only the caller could
    measure, "export" and "total". Raises RunError if the folder holds no run, or one that has not
    got as far as its evaluation."""
    rounds = RunStore(folder).rounds()
    report = build_report(rounds, Bundle.load(folder / "bundle").manifest, seed, alpha, seconds)
    report["files"] = _files(folder, report)
    text = json.dumps(report, indent=1, sort_keys=True, ensure_ascii=False)
    write_atomically(folder / "report.json", f"{text}\n".encode())
    shown = _shown(report, rounds)
    write_atomically(folder / "report.png", png(shown))
    write_atomically(folder / "report.html", _page(folder.name, report, rounds, shown).encode())
    _print(folder, report)


def build_report(
    rounds: Sequence[ClosedRound], manifest: Manifest, seed: int, alpha: float, seconds: dict[str, float]
) -> Report:
    """The numbers, without touching the disk. Raises RunError if no round has evaluated the models."""
    evaluations = successful_rounds(rounds, Stage.EVALUATE)
    tested = {name: update for name, update in evaluations[-1].updates.items() if update.samples} if evaluations else {}
    if not tested:
        raise RunError("the run has no evaluation of any device's test slice, so there is nothing to report")
    evaluation = evaluations[-1]
    stage1, stage2 = successful_rounds(rounds, Stage.GLOBAL), successful_rounds(rounds, Stage.PERSONAL)
    exchanged = [r for r in rounds if r.round.stage in (Stage.GLOBAL, Stage.PERSONAL)]
    rss: dict[str, float] = {}
    for update in (update for r in rounds for update in r.updates.values()):
        rss[update.device] = max(rss.get(update.device, 0.0), round(update.peak_rss_mb, 1))
    return {
        "seed": seed,
        "alpha": alpha,
        "devices": len({name for r in rounds for name in (*r.updates, *r.missing)}),
        "classes": len(manifest.classes),
        "class_names": list(manifest.classes),
        "model": manifest.model,
        "samples": SAMPLES[manifest.preprocessing.kind],
        "rounds": {"stage1": len(stage1), "stage2": len(stage2)},
        "seconds": _seconds(rounds, seconds),
        "accuracy": _accuracy(evaluation, tested),
        "accuracy_global_test": {name: _rounded(_balanced(tested, name)) for name in ("start", "global")},
        "test_images": {name: update.samples for name, update in sorted(tested.items())},
        "gate": {
            "mean_local_weight": _rounded(evaluation.mean("mean_local_weight") or 0.0),
            "entropy": _rounded(evaluation.mean("gate_entropy") or 0.0),
        },
        "levels": [r.round.level for r in stage1],
        "tuned_share": manifest.tuned_share,
        "tuned_parameters": manifest.tuned_parameters,
        "backbone_parameters": manifest.backbone_parameters,
        "bytes_up_per_device_round": _mean(size for r in exchanged for size in r.bytes_up.values()),
        "bytes_down_per_device_round": _mean(u.bytes_down for r in exchanged for u in r.updates.values()),
        "engines": sorted({update.engine for r in rounds for update in r.updates.values()} - {""}),
        "device_peak_rss_mb": max(rss.values()),
        "device_peak_rss_mb_per_device": rss,
    }


def _accuracy(evaluation: ClosedRound, tested: dict[str, Update]) -> Report:
    """Of every model that at least one device has: its mean over all that was tested, and each device's."""
    accuracy = {}
    for model in NAMES:
        mean = evaluation.mean(model)
        if mean is not None:
            held = {name: update.metrics[model] for name, update in sorted(tested.items()) if model in update.metrics}
            accuracy[model] = {
                "mean": _rounded(mean),
                "per_device": {name: _rounded(value) for name, value in held.items()},
            }
    return accuracy


def _balanced(tested: dict[str, Update], model: str) -> float:
    """Accuracy as if every class had been tested as often as any other: the mean of the classes' recalls."""
    right = [sum(column) for column in zip(*(u.counts[model] for u in tested.values()), strict=True)]
    images = [sum(column) for column in zip(*(u.counts["test"] for u in tested.values()), strict=True)]
    recalls: list[float] = [hits / total for hits, total in zip(right, images, strict=True) if total]
    return sum(recalls) / len(recalls)


def _seconds(rounds: Sequence[ClosedRound], seconds: dict[str, float]) -> dict[str, float]:
    """A repeated round took its time too."""
    names = {
        Stage.STATISTICS: "features",
        Stage.GLOBAL: "stage1",
        Stage.PERSONAL: "stage2",
        Stage.BASELINE: "baseline",
        Stage.EVALUATE: "evaluation",
    }
    spent = {name: sum(r.seconds for r in rounds if r.round.stage is stage) for stage, name in names.items()}
    return {name: round(value, 1) for name, value in (seconds | spent).items()}


def _files(folder: Path, report: Report) -> Report:
    """Where the models to use lie, relative to the run's folder."""
    personal = {name: f"devices/{name}/personalized.onnx" for name in report["test_images"]}
    return {
        "global_expert": "global_expert",
        "personalized": {name: path for name, path in personal.items() if (folder / path).is_file()},
    }


def _shown(report: Report, rounds: Sequence[ClosedRound]) -> Shown:
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
    return Shown(
        headline=_headline(report),
        means={model: values["mean"] for model, values in accuracy.items()},
        accuracies={model: values["per_device"] for model, values in accuracy.items()},
        samples=report["samples"],
        tested=report["test_images"],
        points=points,
    )


def _headline(report: Report) -> str:
    stages = report["rounds"]
    what = f"{report['model']} · {report['classes']} classes · {report['devices']} devices"
    return f"{what} · α {report['alpha']:g} · seed {report['seed']} · {stages['stage1']} + {stages['stage2']} rounds"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name} · FedFMSL Edge</title>
<style>
body {{ margin: 0 auto; max-width: 1200px; padding: 1.5rem 1rem 3rem; color: #222; background: #fff;
  font: 16px/1.5 system-ui, sans-serif }}
h1 {{ margin: 0; font-size: 1.6rem }}
h2 {{ margin: 2.5rem 0 .5rem; font-size: 1.15rem }}
p {{ margin: .25rem 0; color: #555 }}
a {{ color: #0072b2; overflow-wrap: anywhere }}
.pictures {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: 2rem;
  margin-top: 1.5rem }}
img {{ width: 100%; height: auto }}
.wide {{ overflow-x: auto }}
table {{ border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }}
th, td {{ padding: .35rem .8rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #e8e8e8 }}
th {{ color: #555; font-weight: 600 }}
th:first-child, td:first-child {{ padding-left: 0; text-align: left }}
</style>
</head>
<body>
<h1>{name}</h1>
<p>{headline}</p>
<p>{summary}</p>
<div class="pictures">{pictures}</div>
<h2>Test accuracy</h2>
{accuracies}
<h2>Rounds, with accuracy on held-out {samples}</h2>
{rounds}
<h2>Models to use</h2>
{models}
</body>
</html>
"""


def _page(name: str, report: Report, rounds: Sequence[ClosedRound], shown: Shown) -> str:
    pictures = [
        f'<img alt="{html.escape(title)}" src="data:image/svg+xml;base64,{base64.b64encode(svg).decode()}">'
        for title, svg in svgs(shown)
    ]
    files = report["files"]
    links = [("Global expert (PEFT adapter)", files["global_expert"])]
    links += [(f"Personalized model of {device} (ONNX)", path) for device, path in files["personalized"].items()]
    models = [
        f'<p>{html.escape(what)}: <a href="{html.escape(path)}">{html.escape(path)}</a></p>' for what, path in links
    ]
    return _PAGE.format(
        name=html.escape(name),
        headline=html.escape(_headline(report)),
        summary=html.escape(_summary(report)),
        pictures="\n".join(pictures),
        accuracies=_html_table(_accuracy_rows(report)),
        samples=report["samples"],
        rounds=_html_table(_round_rows(rounds)),
        models="\n".join(models),
    )


def _summary(report: Report) -> str:
    tuned = f"{report['tuned_parameters']:,} of {report['backbone_parameters']:,} parameters tuned"
    balanced = report["accuracy_global_test"]["global"]
    gate = report["gate"]["mean_local_weight"]
    return (
        f"{tuned} ({report['tuned_share']:.2%}) · global expert on a class-balanced test {balanced:.1%} · "
        f"the gate gives the local expert {gate:.2f} · peak memory of a device {report['device_peak_rss_mb']:.0f} MB"
    )


def _accuracy_rows(report: Report) -> list[list[str]]:
    accuracy, images = report["accuracy"], report["test_images"]
    rows = [["device", f"test {report['samples']}", *(NAMES[model] for model in accuracy)]]
    for device in images:
        values = (values["per_device"].get(device) for values in accuracy.values())
        rows.append([device, str(images[device]), *("" if v is None else f"{v:.1%}" for v in values)])
    means = (f"{values['mean']:.1%}" for values in accuracy.values())
    return [*rows, ["all", str(sum(images.values())), *means]]


def _round_rows(rounds: Sequence[ClosedRound]) -> list[list[str]]:
    models = [model for model in NAMES if any(model in r.held_out for r in rounds)]
    rows = [["round", "stage", "level", *(NAMES[m] for m in models), "updates", "kB up", "kB down", "seconds", ""]]
    for r in rounds:
        said, updates, held = r.round, r.updates.values(), r.held_out
        remarks = [f"without {', '.join(r.missing)}"] if r.missing else []
        remarks += ["repeated"] if r.repeated else []
        rows.append(
            [
                str(said.round),
                f"{said.stage.value} {said.index + 1}/{said.of}",
                str(said.level),
                *(f"{held[model]:.1%}" if model in held else "" for model in models),
                str(len(updates)),
                f"{_mean(r.bytes_up.values()) / 1000:.1f}",
                f"{_mean(u.bytes_down for u in updates) / 1000:.1f}",
                f"{r.seconds:.1f}",
                ", ".join(remarks),
            ]
        )
    return rows


def _html_table(rows: Sequence[Sequence[str]]) -> str:
    lines = []
    for tag, row in zip(["th", *["td"] * (len(rows) - 1)], rows, strict=True):
        lines.append("<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>")
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def _print(folder: Path, report: Report) -> None:
    rows = _accuracy_rows(report)
    table = Table(title="Test accuracy", title_justify="left", box=None, pad_edge=False)
    for index, name in enumerate(rows[0]):
        table.add_column(name, justify="right" if index else "left")
    for row in rows[1:]:
        table.add_row(*row, end_section=row is rows[-2], style="bold" if row is rows[-1] else "")
    console.print(table)
    console.print(f"\nreport              {folder / 'report.html'}")
    console.print(f"global expert       {folder / report['files']['global_expert']}")
    for path in report["files"]["personalized"].values():
        console.print(f"personalized model  {folder / path}")


def _mean(values: Iterable[float]) -> float:
    """0 of nothing."""
    listed = list(values)
    return round(sum(listed) / len(listed), 1) if listed else 0.0


def _rounded(value: float) -> float:
    return round(value, DIGITS)
