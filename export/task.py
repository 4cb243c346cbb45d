"""python -m export.task: the task of a run over a bundle, with a zero-shot head if the model has a text tower."""

from __future__ import annotations

from pathlib import Path

import typer

from export.class_options import CLASSES_HELP, class_names
from export.models import MODELS, RANDOM
from fedfmsl.common.cli import application, console
from fedfmsl.common.files import write_atomically
from fedfmsl.errors import ConfigError
from fedfmsl.protocol.bundle import Bundle
from fedfmsl.protocol.task import TASK, Task, ZeroShot
from fedfmsl.protocol.task_bundle import TaskBundle

WITH_TEXT_TOWER = ("clip",)  # families

app = application()


@app.command()
def make_task(
    bundle: Path = typer.Option(help="Bundle folder, as export.build writes it."),
    classes: str | None = typer.Option(None, help=CLASSES_HELP),
    classes_from: Path | None = typer.Option(None, help="Take the class names from this folder's subfolders."),
    classes_file: Path | None = typer.Option(None, help="Take the class names from this text file, one per line."),
    prompt: list[str] | None = typer.Option(
        None, help="Prompt template for CLIP with '{}' for the class name. Repeatable. Default: five templates."
    ),
    weights: str | None = typer.Option(
        None, help="The bundle's transformers folder, for CLIP's text tower. Default: that of the model, from the hub."
    ),
    out: Path | None = typer.Option(None, help=f"File of the task. Default: {TASK} in the bundle folder."),
) -> None:
    """Write the task of a run over a bundle: class names, and a zero-shot head if the model has a text tower.

    Without a text tower no file is needed: name the classes with --classes of trainer_server start.
    """
    opened = Bundle.load(bundle)
    names = class_names(classes, classes_from, classes_file)
    if not names:
        raise ConfigError("a task needs its classes; pass --classes, --classes-file or --classes-from")
    task = Task.of(opened.sha256, names, "--classes", _zero_shot(opened, names, prompt, weights))
    TaskBundle(opened, task)
    path = out or opened.root / TASK
    try:
        write_atomically(path, task.blob)
    except OSError as error:
        raise ConfigError(f"--out {path} cannot be written ({error.strerror}); choose another path") from error
    head = ", with a zero-shot head for --head zero-shot" if task.zero_shot else ""
    console.print(f"task {path}: {len(names)} classes, SHA-256 {task.sha256[:12]}…{head}")


def _zero_shot(
    bundle: Bundle, names: tuple[str, ...], prompts: list[str] | None, weights: str | None
) -> ZeroShot | None:
    """None if the model has no text tower. Raises ConfigError if its weights are not known, or if there is an option
    for it and no text tower."""
    manifest = bundle.manifest
    if manifest.family not in WITH_TEXT_TOWER:
        if prompts or weights:
            option = "--prompt" if prompts else "--weights"
            raise ConfigError(f"{option} needs a text tower, which {manifest.model} does not have; omit it")
        return None
    if weights is not None and not Path(weights).is_dir():
        raise ConfigError(f"--weights {weights} is not a folder; pass the transformers folder of {manifest.model}")
    if weights is None and (manifest.model not in MODELS or manifest.peft.base == RANDOM):
        raise ConfigError(
            f"the weights of {manifest.model} are not on the hub; pass their folder with --weights, or "
            "name the classes with --classes of trainer_server start, without a zero-shot head"
        )
    from export.weights import find_backbone
    from export.zero_shot import make_zero_shot, require_model_of

    revision = manifest.peft.revision if weights is None else None
    source = find_backbone(weights or manifest.model, None, len(names), None, revision)
    require_model_of(bundle, source)
    return make_zero_shot(source, names, prompts)


if __name__ == "__main__":
    app()
