"""python -m benchmarks.evidence: FedFMSL against the field's methods, and benchmarks/evidence.md.

Runs `fedfmsl simulate` on each block of the protocol (benchmarks/protocol.md). A result is a small file below
benchmarks/evidence/, so the grid can be stopped and continued on any machine. The report lists the seeds of each row.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from benchmarks.photos import thin_pacs, unpack_cifar10
from devices.trial.assets import ASSETS, WEIGHTS, fetch
from devices.trial.groceries import groceries
from fedfmsl.common.class_folders import folder_classes, has_splits, subfolders
from fedfmsl.common.cli import application
from fedfmsl.common.files import write_atomically
from fedfmsl.errors import ConfigError, InputError, RunError
from fedfmsl.protocol.class_names import write_names
from fedfmsl.protocol.task_bundle import TaskBundle
from simulation.charts import own_against_novel
from simulation.methods import METHODS
from simulation.results import STREAM, Result, grouped, read_results, spread, value_of
from simulation.run import simulate
from simulation.settings import SimulationSettings
from trainer_server.config import STAGE1

RESULTS, REPORT = (Path(__file__).with_name(name) for name in ("evidence", "evidence.md"))
SHARES = ("0.0", "0.1", "0.5")  # of novel samples in a stream, as in the result files
FEDFMSL = "fedfmsl"
SAL = (FEDFMSL, "fedfmsl-all-at-once", "fedfmsl-fixed-schedule")  # they differ with several levels only
AT_ONE_LEVEL = tuple(name for name in METHODS if name not in SAL[1:])
COLUMNS = ("own", "novel", "fleet", "harmonic", "worst_decile")
# Controls are computed at the rate of FedFMSL, too.
FIELD_RATE, CONTROLS = 2e-3, ("fedit", "fine-tuning", "fedit-head")
ROW_TITLES = {"start": "after its first round", "global": "its global expert", "local-expert": "its local expert"}
COSTS = {"kilobytes_up": "kB up", "kilobytes_down": "kB down", "device_seconds": "device-seconds"}

app = application()


@dataclass(frozen=True)
class Block:
    """One data set and partition. `settings`: those that differ from the simulator's defaults."""

    title: str
    settings: Mapping[str, Any]
    levels: int = 1
    methods: tuple[str, ...] = AT_ONE_LEVEL


SIZE = 140  # pixels
BLOCKS = {
    "groceries": Block("Groceries, Dirichlet", {"alpha": (0.5, 0.1), "devices": 6, "unseen": 1}),
    "pacs": Block("PACS, a domain per group of devices", {"partition": "natural", "devices": 8}),
    "cifar10": Block("CIFAR-10, Dirichlet", {"alpha": (0.5,), "devices": 20, "unseen": 2}),
    "levels": Block(
        "Groceries, SAL up to level 3, Dirichlet",
        {"alpha": (0.5,), "devices": 6, "unseen": 1},
        levels=3,
        methods=SAL,
    ),
}


@app.command()
def evidence(
    only: list[str] = typer.Option(
        [], help="Block to run: groceries, pacs, cifar10 or levels; may be repeated. Default: all."
    ),
    pacs: Path | None = typer.Option(
        None, help="Folder of PACS: DIR/<domain>/<class>/. Without it the block is skipped."
    ),
    methods: list[str] = typer.Option([], help="Method to run; may be repeated. Default: those of the block."),
    seeds: int = typer.Option(3, min=1, help="Seeds 0 … n-1."),
    threads: int = typer.Option(0, min=0, help="Threads; 0: one per core."),
    report_only: bool = typer.Option(False, "--report-only", help="Only write the report of the results so far."),
) -> None:
    """Run the missing cells of the evidence grid, and write its report."""
    for kind, names, known in (("block", only, BLOCKS), ("method", methods, METHODS)):
        for name in names:
            if name not in known:
                raise ConfigError(f"there is no {kind} {name!r}; choose from {', '.join(known)}")
    for block in [] if report_only else only or BLOCKS:
        images = _photos(block, pacs)
        if images is None:
            print("pacs: not run; it needs --pacs DIR", file=sys.stderr)
        else:
            _run(block, images, methods or BLOCKS[block].methods, seeds, threads)
    write_atomically(REPORT, _report().encode())
    print(REPORT)


def _photos(name: str, pacs: Path | None) -> Path | None:
    """The photos of a block. None for PACS without its folder."""
    if name == "pacs":
        return thin_pacs(pacs, ASSETS / "pacs") if pacs is not None else None
    if name == "cifar10":
        return unpack_cifar10(ASSETS)
    return groceries()


def _run(name: str, images: Path, methods: Sequence[str], seeds: int, threads: int) -> None:
    """Results are kept in the repository: known ones are given to the simulator, new ones are taken back."""
    block, run = BLOCKS[name], f"evidence-{name}"
    kept, results = RESULTS / name, Path("runs") / run / "results"
    bundle = build_bundle(Path("runs") / f"{run}-bundle", images, block.levels)
    _copy_results(kept, results)
    for seed in range(1, seeds + 1):  # seed by seed, so that an interrupted grid has whole rows
        for method in methods:
            simulate(
                SimulationSettings(
                    bundle=bundle.root,
                    name=run,
                    images=images,
                    methods=(method,),
                    learning_rate=rates_of(method),
                    seeds=seed,
                    threads=threads,
                    **block.settings,
                )
            )
            _copy_results(results, kept)


def rates_of(method: str) -> tuple[float, ...]:
    """The learning rates that a method is computed at."""
    own = (STAGE1.learning_rate,)
    if method.startswith(FEDFMSL):
        return own
    return (FIELD_RATE, *own) if method in CONTROLS else (FIELD_RATE,)


def _copy_results(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for path in source.glob("*.json"):
        shutil.copyfile(path, target / path.name)


def build_bundle(folder: Path, images: Path, levels: int, precision: str = "fp32", size: int = SIZE) -> TaskBundle:
    """The trial's backbone with so many levels, for photos of `size` pixels, built once. Raises RunError if the build
    fails."""
    if not folder.is_dir():
        weights, names = ASSETS / "dinov2-s14", folder.with_name(f"{folder.name}-classes.txt")
        write_names(names, classes_of(images))
        if not weights.is_dir():
            _python("export.rebuild", str(fetch(WEIGHTS)), str(weights))
        command = ["--model", "dinov2-s14", "--weights", str(weights), "--classes-file", str(names)]
        command += ["--precision", precision]
        _python("export.build", *command, "--image-size", str(size), "--levels", str(levels), "--out", str(folder))
    return TaskBundle.load(folder)


def classes_of(images: Path) -> list[str]:
    """The classes of DIR/<class>, DIR/train/<class> or DIR/<group>/<class>, sorted."""
    found = folder_classes(images, "photos", [])
    groups = [] if has_splits(images, "photos") else subfolders(images, "photos", [])
    return sorted({name for group in groups for name in subfolders(images / group, "photos", [])}) or found


def _python(*command: str) -> None:
    if subprocess.run([sys.executable, "-m", *command], check=False).returncode:
        raise RunError(f"{command[0]} failed; see the output above")


def _report() -> str:
    lines = [
        "# Evidence",
        "",
        "FedFMSL against the field's methods, under the same conditions. The conditions and every choice are in",
        "[protocol.md](protocol.md). Mean ± standard deviation over the seeds; losing rows stay in.",
        "FedFMSL adapts its class prior along the streams, without labels; the other methods do not change along them.",
        "Written by `python -m benchmarks.evidence`.",
    ]
    for name, block in BLOCKS.items():
        results = results_of(RESULTS / name)
        for alpha in sorted({result["alpha"] for result in results}, key=lambda each: -(each or 0)):
            same = [result for result in results if result["alpha"] == alpha]
            lines += ["", f"## {block.title}{'' if alpha is None else f', α = {alpha:g}'}", "", *_table(same)]
            svg = own_against_novel([each for each in same if not _is_second_rate(each)])
            if svg is not None:
                picture = RESULTS / f"{name}{'' if alpha is None else f'-{alpha:g}'}.svg"
                write_atomically(picture, svg)
                lines += ["", f"![Own against novel accuracy]({picture.relative_to(REPORT.parent)})"]
        if not results:
            lines += ["", f"## {block.title}", "", "Not run yet."]
    return "\n".join(lines) + "\n"


def _is_second_rate(result: Result) -> bool:
    """Whether the method is in the picture at another rate."""
    return result["method"] in CONTROLS and result["learning_rate"] != FIELD_RATE


def results_of(folder: Path) -> list[Result]:
    """The results of a block. Raises InputError if a cell has two: a mean over both would count a seed twice."""
    paths: dict[str, Path] = {}
    for path in sorted(folder.glob("*.json")):
        cell = path.stem.rpartition("-")[0]  # the last part is the digest of version, bundle, data and settings
        if cell in paths:
            raise InputError(
                f"{paths[cell]} and {path} are results of the same cell; remove the outdated one "
                "here and in runs/evidence-*/results"
            )
        paths[cell] = path
    return read_results(paths.values())


def _table(results: Sequence[Result]) -> list[str]:
    """A row for each method in the order of METHODS, and for the parts of FedFMSL."""
    head = ["method", "rate", "seeds", *(column.replace("_", " ") for column in COLUMNS)]
    head += [*(f"stream {float(share):.0%}" for share in SHARES), "unseen", "unseen, trained", *COSTS.values()]
    lines = [head, ["---"] * len(head)]
    order = list(METHODS)
    for (method, row, _, rate), same in sorted(grouped(results).items(), key=lambda item: order.index(item[0][0])):
        if row == method or method == FEDFMSL:
            lines.append([ROW_TITLES.get(row) or str(same[0]["title"]), f"{rate:g}", *_cells(row, same, row == method)])
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _cells(row: str, same: Sequence[Result], with_costs: bool) -> list[str]:
    cells = [", ".join(str(result["seed"]) for result in same)]
    columns = (*COLUMNS, *(f"{STREAM}{share}" for share in SHARES), "unseen", "unseen_adapted")
    cells += [spread([value_of(result, row, column) for result in same], ".3f") for column in columns]
    for column, form in zip(COSTS, (".0f", ".0f", ".3f"), strict=True):
        cells.append(format(statistics.mean(result[column] for result in same), form) if with_costs else "")
    return cells


if __name__ == "__main__":
    app()
