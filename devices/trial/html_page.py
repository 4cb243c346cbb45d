"""report.html: the charts and tables of a report in one file without external resources."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any

from devices.trial.charts import NAMES, ChartData, svgs
from fedfmsl.common import web_page
from trainer_server.coordinator.records import ClosedRound, listed

Report = dict[str, Any]  # the content of report.json

_BODY = """<p>{headline}</p>
<p>{summary}</p>
<p>{coverage}</p>
{gaps}
{charts}
<h2>Test accuracy of the models</h2>
<p>{definitions}</p>
{models_table}
{unseen}
<h2>Test accuracy of each device on its own {samples}</h2>
{accuracies}
<h2>Rounds, with accuracy on held-out {samples}</h2>
{rounds}
<h2>Models</h2>
{models}"""

_DEFINITIONS = (
    "own: the device's own test {samples} · novel: those of classes that it does not hold, but another device does · "
    "fleet: those of all devices · harmonic: harmonic mean of own and novel · "
    "worst 10%: own, over the worst 10 % of devices · 10% novel: a stream of {samples}, 10 % of them novel; "
    "MoFM adapts to it"
)


def render_page(name: str, report: Report, rounds: Sequence[ClosedRound], data: ChartData) -> str:
    files = report["files"]
    links = [("Global expert (PEFT adapter)", files["global_expert"])]
    links += [(f"Personalized model of {device} (ONNX)", path) for device, path in files["personalized"].items()]
    models = [
        f'<p>{html.escape(what)}: <a href="{html.escape(path)}">{html.escape(path)}</a></p>' for what, path in links
    ]
    body = _BODY.format(
        headline=html.escape(headline(report)),
        summary=html.escape(_summary(report)),
        coverage=html.escape(coverage(report)),
        gaps="\n".join(f"<p><strong>{html.escape(text)}</strong></p>" for text in gaps(report)),
        charts=web_page.charts(svgs(data)),
        definitions=html.escape(_DEFINITIONS.format(samples=report["samples"])),
        models_table=web_page.table(model_rows(report)),
        unseen=_unseen(report),
        accuracies=web_page.table(accuracy_rows(report)),
        samples=report["samples"],
        rounds=web_page.table(_round_rows(rounds)),
        models="\n".join(models),
    )
    return web_page.page(name, body)


def _summary(report: Report) -> str:
    tuned = f"{report['tuned_parameters']:,} of {report['backbone_parameters']:,} parameters tuned"
    balanced = report["accuracy_global_test"]["global"]
    gate = report["gate"]["mean_local_weight"]
    return (
        f"{tuned} ({report['tuned_share']:.2%}) · global expert, class-balanced test accuracy {balanced:.1%} · "
        f"mean gate weight of local experts {gate:.2f} · peak memory of a device {report['device_peak_rss_mb']:.0f} MB"
    )


def _unseen(report: Report) -> str:
    """A section about devices that did not take part, if there are any."""
    unseen = report["unseen"]
    if unseen is None:
        return ""
    (accuracy, *_) = unseen["accuracy"].values()
    names = ", ".join(accuracy["per_device"])
    text = f"These devices did not take part: {names}. They have received the globals and have not trained."
    return f"<h2>Unseen devices</h2><p>{html.escape(text)}</p>{web_page.table(model_rows(unseen))}"


def model_rows(report: Report) -> list[list[str]]:
    """What every model is measured on, as a table: a head, and a row per model. Also of the part `unseen`."""
    shares = sorted({share for by_share in report["accuracy_stream"].values() for share in by_share}, key=float)
    shares = [share for share in shares if float(share) > 0]
    streams = [f"{float(share):.0%} novel" for share in shares]
    rows = [["model", "own", "novel", "fleet", "harmonic", "worst 10%", *streams]]
    for model, own in report["accuracy"].items():
        values = (
            *(own["mean"], report["accuracy_novel"][model]["mean"], report["accuracy_fleet"][model]["mean"]),
            *(report["harmonic"][model], report["worst_decile"][model]),
            *(report["accuracy_stream"][model].get(share) for share in shares),
        )
        rows.append([NAMES[model], *("" if value is None else f"{value:.1%}" for value in values)])
    return rows


def accuracy_rows(report: Report) -> list[list[str]]:
    """Own test accuracies as a table: a head, a row per device, and their mean."""
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
        round_, updates, held = r.round, r.updates.values(), r.held_out
        remarks = [f"without {', '.join(r.missing)}"] if r.missing else []
        remarks += ["repeated"] if r.repeated else []
        rows.append(
            [
                str(round_.round),
                f"{round_.stage.value} {round_.ordinal[0]}/{round_.ordinal[1]}",
                str(round_.level),
                *(f"{held[model]:.1%}" if model in held else "" for model in models),
                str(len(updates)),
                f"{mean(r.bytes_up.values()) / 1000:.1f}",
                f"{mean(u.bytes_down for u in updates) / 1000:.1f}",
                f"{r.seconds:.1f}",
                ", ".join(remarks),
            ]
        )
    return rows


def headline(report: Report) -> str:
    """Model, data and seed in one line."""
    stages = report["rounds"]
    model = f"{report['model']} · {report['classes']} classes · {report['devices']} devices"
    return f"{model} · α {report['alpha']:g} · seed {report['seed']} · {stages['stage1']} + {stages['stage2']} rounds"


def coverage(report: Report) -> str:
    """How many of the user's files were used. "": all of them."""
    used, skipped = report["used_files"], report["skipped_files"]
    return f"{used} of {used + skipped} {report['samples']} were used, {skipped} were skipped" if skipped else ""


def gaps(report: Report) -> list[str]:
    """What is missing in the report: a line for each model that was not measured on every device, and for devices that
    hardly took part."""
    missing = {name: listed(devices) for name, devices in report["missing"].items() if devices}
    lines = []
    if names := missing.pop("evaluation", ""):
        lines.append(f"All accuracies are without {names}: no evaluation of theirs arrived.")
    lines += [f"{NAMES[model]} is without {names}, and cannot be compared." for model, names in missing.items()]
    rounds = report["rounds"]["stage1"] + report["rounds"]["stage2"]
    for name, count in report["rarely_took_part"].items():
        lines.append(f"{name} took part in {count} of {rounds} training rounds.")
    return lines


def mean(values: Iterable[float]) -> float:
    """Rounded to one digit; 0 without values."""
    listed = list(values)
    return round(sum(listed) / len(listed), 1) if listed else 0.0
