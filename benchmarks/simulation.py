"""python -m benchmarks.simulation: one federated job in our simulator and in Flower's, and benchmarks/simulation.md.

Flower needs an environment of its own:

    python -m venv flower
    flower/bin/pip install 'flwr[simulation]==1.42.0' torch==2.13.0 peft==0.21.2 transformers==4.57.6
    python -m benchmarks.simulation --flower-python flower/bin/python

Measurements are kept in runs/simulation-benchmark/. The command measures what is missing there.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import typer

from benchmarks.evidence import build_bundle
from benchmarks.photos import unpack_cifar10
from benchmarks.process_tree import measure
from benchmarks.simulation_job import Job, LoadedJob, command, write_for_flower
from benchmarks.simulation_report import report
from benchmarks.simulation_runs import Run, Runs
from devices.trial.assets import ASSETS
from fedfmsl.common.cli import application
from fedfmsl.common.files import write_atomically
from fedfmsl.errors import InputError
from fedfmsl.protocol.task_bundle import TaskBundle
from simulation.results import key_of

RUNS, REPORT = Path("runs/simulation-benchmark"), Path(__file__).with_name("simulation.md")
LEVELS = 12  # blocks of DINOv2 ViT-S/14
TRIED_ROUNDS = 3  # of each setting of Flower; the first one loads the models
WHOLE_ROUNDS = 8  # with LoRA in all blocks; evaluated after the last one
EVALUATED = 10  # after the rounds of Flower, every tenth round of ours is evaluated
# Nothing is sent to the makers of Flower, Ray and transformers.
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1"}

app = application()


@dataclass(frozen=True)
class Setting:
    """How Flower runs: bfloat16 autocast or fp32, and `actors` processes with `threads` threads each."""

    bf16: bool
    actors: int
    threads: int

    @property
    def name(self) -> str:
        return f"{'bf16' if self.bf16 else 'fp32'}-{self.actors}x{self.threads}"

    @property
    def title(self) -> str:
        precision = "bfloat16 autocast" if self.bf16 else "fp32"
        return f"{precision}, {self.actors} × {self.threads} threads"


@dataclass(frozen=True)
class Benchmark:
    """`python`: of Flower's environment."""

    job: Job
    python: Path
    flower_rounds: int

    @cached_property
    def folder(self) -> Path:
        """Of the measurements of this job."""
        return (RUNS / key_of({**asdict(self.job), "flower_rounds": self.flower_rounds})).absolute()

    @cached_property
    def loaded(self) -> LoadedJob:
        """The job for Flower and for evaluation. Its features are not those of the measured runs."""
        return LoadedJob(replace(self.job, features=str(self.folder / "features")))

    @cached_property
    def described(self) -> Path:
        """The folder that Flower reads."""
        folder = self.folder / "job"
        if not (folder / "job.json").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            write_for_flower(self.loaded, folder, (self.job.level, LEVELS))
        return folder

    def ours(self, seed: int) -> Run:
        """The features are computed in the run of seed 0."""
        job = replace(self.job, features=str(self.folder / "ours-0" / "features"), seed=seed)
        return self._measured(f"ours-{seed}", lambda out: command(job, out), os.environ, lambda: self.loaded)

    def int8(self, bundle: TaskBundle) -> Run:
        """Our run with another bundle, which also evaluates it."""
        name = "ours-int8"
        job = replace(self.job, bundle=str(bundle.root), features=str(self.folder / name / "features"))
        return self._measured(name, lambda out: command(job, out), os.environ, lambda: LoadedJob(job))

    def flower(self, name: str, setting: Setting, rounds: int, level: int, cached: bool = False) -> Run:
        def start(out: Path) -> list[str]:
            options = {"folder": str(self.described), "out": str(out), "rounds": rounds, "level": level}
            variant = json.dumps({**options, "cached": cached, **asdict(setting)})
            code = f"from benchmarks.flower_simulation import main; main({variant!r})"
            return [str(self.python), "-c", code]

        environment = {**os.environ, **QUIET, "PYTHONPATH": str(Path.cwd())}
        return self._measured(name, start, environment, lambda: self.loaded)

    def _measured(
        self,
        name: str,
        start: Callable[[Path], list[str]],
        environment: Mapping[str, str],
        evaluator: Callable[[], LoadedJob],
    ) -> Run:
        out = self.folder / name
        result = out / "result.json"
        if not result.is_file():
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir(parents=True)
            usage = measure(start(out), environment)
            found = sorted((int(path.stem.removeprefix("theta-")), path) for path in out.glob("theta-*.npy"))
            loaded, thetas = evaluator(), {index: np.load(path) for index, path in found}
            every = thetas[0].size == loaded.bundle.expert.size(self.job.level)
            accuracy = {
                index: loaded.accuracy(theta)
                for index, theta in thetas.items()
                if index == len(thetas) - 1 or (every and (index <= self.flower_rounds or index % EVALUATED == 0))
            }
            write_atomically(result, Run(usage, accuracy).to_json())
        return Run.from_json(result.read_bytes())


@app.command()
def simulation(
    flower_python: Path = typer.Option(..., help="Python of an environment with flwr[simulation], torch and peft."),
    rounds: int = typer.Option(100, min=1, help="Rounds of our simulator."),
    flower_rounds: int = typer.Option(12, min=2, help="Rounds of Flower."),
    learning_rate: float = typer.Option(Job.learning_rate, help="Learning rate of AdamW on the devices."),
    threads: int = typer.Option(0, min=0, help="Threads of our simulator; 0: one per core."),
) -> None:
    """Run the same federated job in our simulator and in Flower's."""
    if not flower_python.is_file():
        raise InputError(f"--flower-python {flower_python} does not exist; python -m benchmarks.simulation --help")
    images = unpack_cifar10(ASSETS)
    bundle = build_bundle(Path(f"{RUNS}-bundle"), images, LEVELS)
    int8 = build_bundle(Path(f"{RUNS}-bundle-int8"), images, 1, "int8")
    weights = str((ASSETS / "dinov2-s14").absolute())
    job = Job(str(bundle.root), str(images), "", weights, rounds, learning_rate=learning_rate, threads=threads)
    benchmark = Benchmark(job, flower_python.absolute(), flower_rounds)
    _ = benchmark.described
    ours = [benchmark.ours(seed) for seed in range(3)]
    cores = os.cpu_count() or 1
    settings = [
        Setting(bf16, actors, cores // actors) for bf16 in (False, True) for actors in dict.fromkeys((1, cores))
    ]
    tried = {each: benchmark.flower(f"try-{each.name}", each, TRIED_ROUNDS, job.level) for each in settings}
    best = min(tried, key=lambda each: tried[each].per_round.processor)
    runs = Runs(
        ours=ours,
        int8=benchmark.int8(int8),
        tried={each.title: run for each, run in tried.items()},
        best=best.title,
        flower=benchmark.flower("flower", best, flower_rounds, job.level),
        cached=benchmark.flower("flower-cached", best, flower_rounds, job.level, cached=True),
        whole=benchmark.flower("flower-all-blocks", best, WHOLE_ROUNDS, LEVELS),
    )
    write_atomically(REPORT, report(job, runs).encode())
    print(REPORT)


if __name__ == "__main__":
    app()
