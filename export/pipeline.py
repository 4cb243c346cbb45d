"""The steps of a build, with a progress bar: weights, zero-shot head, bundle."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from export.bundle import build_bundle, check_levels, check_out
from export.weights import Found, find_backbone, load_weights
from export.zero_shot import make_zero_shot
from fedfmsl.common.cli import console
from fedfmsl.common.files import write_atomically
from fedfmsl.errors import ConfigError
from fedfmsl.protocol.bundle import Bundle
from fedfmsl.protocol.setting_types import Precision
from fedfmsl.protocol.task import TASK, Task
from fedfmsl.protocol.task_bundle import TaskBundle

OUTPUTS = 5  # of the torch model that the graphs are compared with; none of them is in the bundle


@dataclass(frozen=True)
class Options:
    """The options of `python -m export.build`, with the names of the classes, if it writes a task."""

    model: str
    weights: str | None
    classes: tuple[str, ...]
    levels: int | None
    image_size: int | None
    max_tokens: int | None
    tokenizer: Path | None
    rank: int
    precision: Precision
    ort_training: bool
    fp16: bool
    prompts: list[str] | None
    revision: str | None
    out: Path | None
    seed: int


def export_bundle(options: Options) -> Bundle:
    """The bundle; with its task if the options name classes. Raises FedFMSLError if an option is unusable, or if the
    weights cannot be exported."""
    size = options.image_size or options.max_tokens
    found = find_backbone(options.model, options.weights, OUTPUTS, size, options.revision, options.tokenizer)
    _check_input(found, options)
    out = options.out or Path("bundles") / found.name
    check_out(out, options.precision, options.levels)
    source = load_weights(found, options.seed)
    columns = (TextColumn("{task.description:<28}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        step = progress.add_task("class names", total=None)
        zero_shot = make_zero_shot(source, options.classes, options.prompts) if options.classes else None
        lora = source.family.lora(options.rank)
        for done, total, what in build_bundle(
            source, options.levels, lora, out, options.seed, options.precision, options.ort_training, options.fp16
        ):
            progress.update(step, completed=done, total=total, description=what)
    bundle = Bundle.load(out)
    if not options.classes:
        return bundle
    return write_task(bundle, Task.of(bundle.sha256, options.classes, "--classes", zero_shot))


def write_task(bundle: Bundle, task: Task) -> TaskBundle:
    """Writes the task of runs that are started without another one beside the bundle's files."""
    together, path = TaskBundle(bundle, task), bundle.root / TASK
    if not path.is_file() or path.read_bytes() != task.blob:
        write_atomically(path, task.blob)
    return together


def _check_input(source: Found, options: Options) -> None:
    """Raises ConfigError if an option is for the other kind of input, or if the model cannot take it."""
    if source.family.input == "tokens" and options.image_size:
        raise ConfigError(f"--image-size is not valid for the text model {source.name}; use --max-tokens")
    if source.family.input == "pixels" and (options.max_tokens or options.tokenizer):
        raise ConfigError(f"--max-tokens and --tokenizer are not valid for the vision model {source.name}; remove them")
    hidden = source.config.hidden_size
    if options.rank > hidden:
        raise ConfigError(f"--rank {options.rank} is more than the hidden size {hidden} of {source.name}; lower it")
    check_levels(options.levels, source.family.geometry(source.config, source.size))
