"""python -m benchmarks.step: time and memory of a training step, for several variants in interleaved turns.

Each variant has its own process. After all are set up, they take turns, `--rounds` times, and only one computes
at a time, so a slow phase of the machine affects all. Times are medians with their spread, memory is the peak of the
process.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from fnmatch import fnmatch
from pathlib import Path

import typer

from benchmarks.machine import describe_machine
from benchmarks.step_table import PRODUCT, REFERENCE, rows_of, table, write_results
from benchmarks.step_variants import COMPILED, Setting, precision_of
from benchmarks.step_worker import Worker, environment_of, take_turns
from export.models import MODELS
from fedfmsl.common.cli import application
from fedfmsl.errors import RunError
from fedfmsl.protocol.bundle import Bundle, TextPreprocessing

LEVELS = (1, 2, 4, 8)  # and the highest one
WHOLE = (REFERENCE, *(f"{REFERENCE}{kind}" for kind in ("-autocast", "-bf16", "-compile", "-bf16-compile")))
SET_UP_AT_ONCE = 2  # processes; compilation and imports use one core each
PRECISIONS = {"FP32": "fp32", "AUTOCAST": "bf16 products", "BF16": "bf16 weights and products"}
TOKENIZER = Path("bundles") / "benchmark-tokenizer.json"

app = application()


@app.command()
def step(
    model: str = typer.Option("vit-b16", help="As for export.build."),
    weights: str | None = typer.Option("random", help="As for export.build."),
    bundle: list[Path] = typer.Option(
        [], help="Bundles of the model; may be repeated. Default: fp32 and int8, built once."
    ),
    levels: str = typer.Option("", help="SAL levels, separated by commas. Default: 1, 2, 4, 8 and the highest one."),
    variants: str = typer.Option("*", help="Patterns of the variants to compare, separated by commas."),
    batch: int = typer.Option(8, min=1),
    threads: int = typer.Option(0, min=0, help="0: one per core."),
    ort_training: Path | None = typer.Option(
        None, help="Also compare onnxruntime-training-cpu, installed in this folder with pip --target."
    ),
    rounds: int = typer.Option(7, min=2, help="Turns of each variant."),
    seed: int = typer.Option(0),
    out: Path | None = typer.Option(
        None, "--json", help="File to write the measurements to. A file of benchmarks/results also updates the docs."
    ),
) -> None:
    """Measure time and memory of a training step, against torch + PEFT."""
    folders = bundle or [bundle_of(model, weights, precision, ort_training) for precision in ("fp32", "int8")]
    threads = threads or os.cpu_count() or 1
    highest = Bundle.load(folders[0]).manifest.levels
    asked_levels = map(int, levels.split(",")) if levels else (*LEVELS, highest)
    chosen = sorted({level for level in asked_levels if level <= highest})
    settings = [Setting(folder, model, weights, batch, threads, seed) for folder in folders]
    planned = [(name, settings[0], None) for name in (PRODUCT, *WHOLE, *_suffixes(folders[0], chosen))]
    precisions = {PRODUCT: "fp32", **{name: PRECISIONS[precision_of(name)] for name, _, _ in planned[1:]}}
    engines: list[tuple[str, Setting, Path | None]] = []
    for setting in settings:
        label = Bundle.load(setting.bundle).manifest.precision
        engines += [(f"step-graph-{label}-{k}", setting, None) for k in chosen]
        if ort_training and label == "fp32":
            engines += [(f"ort-training-{k}", setting, ort_training) for k in chosen]
        precisions.update({name: label for name, each, _ in engines if each is setting})
    patterns = [PRODUCT, *variants.split(",")]
    asked = [each for each in [*planned, *engines] if any(fnmatch(each[0], pattern) for pattern in patterns)]
    reason = why_not_compiled()
    missing = {name: reason for name, _, _ in asked if reason and name.endswith(COMPILED)}
    with ThreadPoolExecutor(SET_UP_AT_ONCE) as pool:
        workers = [*pool.map(lambda each: Worker(*each), [each for each in asked if each[0] not in missing])]
    turns = take_turns(workers, rounds)
    found = gradient_cosines(folders, settings[0], chosen)
    rows = rows_of(turns, {worker.name: worker.flops for worker in workers}, precisions, found)
    results = {
        "date": f"{date.today():%d %B %Y}",
        "machine": describe_machine(threads),
        "setting": {"model": model, "weights": weights, "batch": batch, "seed": seed, "rounds": rounds},
        "rows": rows,
        "missing": missing,
    }
    print(table(results))
    if out:
        write_results(results, out)


def _suffixes(bundle: Path, levels: Sequence[int]) -> list[str]:
    """Variants on cached hidden states in torch. A text's padding is not in its hidden state as torch has it."""
    if isinstance(Bundle.load(bundle).manifest.preprocessing, TextPreprocessing):
        return []
    return [f"torch-suffix-{k}" for k in levels] + [f"torch-suffix-bf16-{k}" for k in levels if k <= 2]


def why_not_compiled() -> str:
    """Why torch.compile cannot be used here; "" if it can."""
    compiler = os.environ.get("CXX", "g++")
    return "" if shutil.which(compiler) else f"no C++ compiler ({compiler}); apt-get install g++"


def gradient_cosines(bundles: Sequence[Path], setting: Setting, levels: Sequence[int]) -> dict[str, float]:
    """See `benchmarks.gradients`, which runs in a process of its own."""
    arguments = {"bundles": [*map(str, bundles)], "setting": {**vars(setting), "bundle": str(setting.bundle)}}
    command = [sys.executable, "-m", "benchmarks.gradients", json.dumps({**arguments, "levels": [*levels]})]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        raise RunError("the gradients could not be compared; see the output above")
    found: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return found


def bundle_of(model: str, weights: str | None, precision: str, ort_training: Path | None = None) -> Path:
    """The bundle of the model. Builds it if it does not exist."""
    with_training = ort_training is not None and precision == "fp32"
    folder = Path("bundles") / f"benchmark-{model}-{precision}{'-training' if with_training else ''}"
    if not (folder / "manifest.json").is_file():
        command = [sys.executable, "-m", "export.build", "--model", model, "--classes", "100", "--out", str(folder)]
        command += ["--precision", precision, *(["--weights", weights] if weights else [])]
        command += ["--ort-training"] if with_training else []
        command += ["--tokenizer", str(_tokenizer())] if weights == "random" and _reads_texts(model) else []
        environment = environment_of(ort_training if with_training else None)
        if subprocess.run(command, env=environment, check=False).returncode:
            raise RunError(f"the bundle of {model} could not be built")
    return folder


def _reads_texts(model: str) -> bool:
    return model in MODELS and MODELS[model].family == "bert"


def _tokenizer() -> Path:
    """A tokenizer of two words, which random weights need as well."""
    if not TOKENIZER.is_file():
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel

        TOKENIZER.parent.mkdir(parents=True, exist_ok=True)
        Tokenizer(WordLevel({"[PAD]": 0, "[UNK]": 1, "word": 2}, unk_token="[UNK]")).save(str(TOKENIZER))
    return TOKENIZER


if __name__ == "__main__":
    app()
