"""python -m export.build: exports a backbone as a bundle.

It imports torch only after it has checked the arguments, because that takes seconds. The help needs no numpy.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from export.class_options import CLASSES_HELP, class_names
from export.models import MODELS, choose_weights
from fedfmsl.common.cli import application, console
from fedfmsl.common.onnx_runtime import require_ort_training
from fedfmsl.errors import ConfigError
from fedfmsl.protocol.class_names import describe_classes
from fedfmsl.protocol.setting_types import Precision

if TYPE_CHECKING:
    from fedfmsl.protocol.bundle import Bundle

MAX_PIXELS = 2048  # per side
MAX_TOKENS = 8192  # per text
MAX_SEED = 2**53

app = application()


@app.command()
def build(
    model: str = typer.Option(help=f"One of {', '.join(MODELS)}, or a transformers folder of one of their families."),
    weights: str | None = typer.Option(
        None, help="A transformers folder, or 'random'. Default: the model's own, from the hub."
    ),
    classes: str | None = typer.Option(
        None,
        help=f"{CLASSES_HELP} Writes a task beside the bundle's files, for runs that are started without another one. "
        "Default: no task; name the classes with trainer_server start --classes.",
    ),
    classes_from: Path | None = typer.Option(None, help="Take the class names from this folder's subfolders."),
    classes_file: Path | None = typer.Option(None, help="Take the class names from this text file, one per line."),
    levels: int | None = typer.Option(None, min=1, help="Highest level to export. Default: the number of blocks."),
    image_size: int | None = typer.Option(
        None, min=1, max=MAX_PIXELS, help="Pixels per side, vision models only. Default: the model's own."
    ),
    max_tokens: int | None = typer.Option(
        None, min=3, max=MAX_TOKENS, help="Tokens per text, text models only. Default: 128."
    ),
    tokenizer: Path | None = typer.Option(
        None, help="A tokenizer.json, text models only. Default: the one beside the weights."
    ),
    rank: int = typer.Option(4, min=1, help="LoRA rank r; alpha is 2r."),
    precision: Precision = typer.Option(
        "fp32", help="Precision of frozen weights. int8 is faster and needs less memory."
    ),
    ort_training: bool = typer.Option(
        False, "--ort-training", help="Also write the artifacts for devices with onnxruntime-training."
    ),
    fp16: bool = typer.Option(
        False, "--fp16", help="Also write graphs with products in float16, which devices with a GPU try."
    ),
    prompt: list[str] | None = typer.Option(
        None, help="Prompt template for CLIP with '{}' for the class name. Repeatable. Default: five templates."
    ),
    revision: str | None = typer.Option(None, help="Hub revision, for example a commit. Default: main."),
    out: Path | None = typer.Option(None, help="Folder of the bundle. Default: bundles/MODEL."),
    seed: int = typer.Option(0, min=0, max=MAX_SEED, help="Seed of the initial LoRA and of random weights."),
) -> None:
    """Export a frozen backbone as a bundle for edge devices."""
    if ort_training:
        require_ort_training("--ort-training")
    names = class_names(classes, classes_from, classes_file)
    if prompt and not names:
        raise ConfigError("--prompt needs the names of the classes; add --classes")
    choose_weights(model, weights, revision)
    try:
        from export.pipeline import Options, export_bundle
    except ModuleNotFoundError as error:
        raise ConfigError(f"an export needs the package {error.name!r}; pip install 'fedfmsl-edge[export]'") from error
    options = Options(
        model=model,
        weights=weights,
        classes=names,
        levels=levels,
        image_size=image_size,
        max_tokens=max_tokens,
        tokenizer=tokenizer,
        rank=rank,
        precision=precision,
        ort_training=ort_training,
        fp16=fp16,
        prompts=prompt,
        revision=revision,
        out=out,
        seed=seed,
    )
    _print_summary(export_bundle(options))


def _print_summary(bundle: Bundle) -> None:
    from fedfmsl.protocol.task_bundle import TaskBundle

    m, levels = bundle.manifest, bundle.manifest.levels
    size = sum(entry.size for entry in m.files.values())
    console.print(f"bundle            {bundle.root}  ({size / 1e6:.1f} MB, SHA-256 {bundle.sha256[:12]}…)")
    console.print(f"model             {m.model}, {m.dims.blocks} blocks, levels 1–{levels}")
    console.print(f"backbone          {m.backbone_parameters:,} parameters, frozen")
    if not isinstance(bundle, TaskBundle):
        lora, row = bundle.lora.total, m.dims.feature + 1
        console.print("task              none; name the classes with python -m trainer_server start --classes")
        console.print(f"tuned at level {levels:<2} {lora:,} parameters, and {row:,} for each class")
        return
    task, tuned = bundle.task, bundle.tuned_parameters
    console.print(f"task              {describe_classes(task.classes)}")
    if task.zero_shot:
        console.print(f"zero-shot head    {len(task.classes)} classes, for --head zero-shot")
    console.print(f"tuned at level {levels:<2} {tuned:,} parameters, share {bundle.tuned_share:.5f}")


if __name__ == "__main__":
    app()
