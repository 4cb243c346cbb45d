"""The model card of the global expert: README.md in its folder, in the form that the Hugging Face hub reads."""

from __future__ import annotations

import json
from dataclasses import dataclass

from fedfmsl.protocol.messages import Stage
from fedfmsl.protocol.task_bundle import TaskBundle
from trainer_server.config import RunConfig
from trainer_server.coordinator.records import ClosedRound


@dataclass(frozen=True)
class Result:
    """Accuracy of the global expert on samples of a `split`, reported by `devices` devices in `round`."""

    accuracy: float
    split: str
    devices: int
    round: int


def result_of(closed: ClosedRound) -> Result | None:
    """What a closed round says about the global expert; None if nothing."""
    evaluated = closed.round.stage is Stage.EVALUATE
    metric = "global" if evaluated else "held_out_global"
    accuracy = closed.mean(metric)
    if accuracy is None or closed.repeated or closed.rejected:
        return None
    devices = sum(metric in update.metrics for update in closed.updates.values())
    return Result(accuracy, "test" if evaluated else "held-out", devices, closed.round.round)


def model_card(bundle: TaskBundle, config: RunConfig, level: int, result: Result | None) -> str:
    """Metadata between two lines `---`, then text. `level`: of the global expert."""
    manifest = bundle.manifest
    task = "image-classification" if manifest.preprocessing.kind == "image" else "text-classification"
    metadata: dict[str, object] = {"library_name": "peft", "pipeline_tag": task}
    base = manifest.peft.base
    on_hub = manifest.peft.revision is not None or "/" in base
    if on_hub:
        metadata["base_model"] = base
    metadata["tags"] = ["lora", "federated-learning", "fedfmsl", *([f"base_model:adapter:{base}"] if on_hub else [])]
    if result:
        measured = {"type": "accuracy", "value": round(result.accuracy, 4), "name": f"accuracy ({result.split})"}
        dataset = {"name": f"{result.split} samples of {result.devices} devices", "type": "private"}
        one = {"task": {"type": task}, "dataset": dataset, "metrics": [measured]}
        metadata["model-index"] = [{"name": config.run, "results": [one]}]
    # JSON is also YAML
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in metadata.items()]
    return "\n".join(["---", *lines, "---", "", *_text(bundle, config, level, result), ""])


def _text(bundle: TaskBundle, config: RunConfig, level: int, result: Result | None) -> list[str]:
    manifest = bundle.manifest
    lora = manifest.lora
    revision = f" at revision `{manifest.peft.revision}`" if manifest.peft.revision else ""
    aggregation = f"Aggregation: {config.aggregation.rule.value}, {config.aggregation.optimizer.value}."
    if config.privacy:
        noise, clip = config.privacy.noise_multiplier, config.privacy.clip
        aggregation += f" Differential privacy: noise multiplier {noise:g}, clipping norm {clip:g}."
    return [
        f"# {config.run}",
        "",
        f"A LoRA adapter with a classification head for `{manifest.peft.base}`{revision}, trained with FedFMSL Edge on "
        "devices that kept their samples.",
        "",
        "## Training",
        "",
        f"- LoRA of rank {lora.rank}, alpha {lora.alpha}, in the last {level} of {manifest.dims.blocks} blocks.",
        f"- {config.stage1_rounds} rounds planned with {config.devices} or more devices. {aggregation}",
        "",
        "## Results",
        "",
        *_results(result),
        "",
        "## Classes",
        "",
        "`labels.json` has them by the number of the output.",
        "",
        *(f"    {index} {json.dumps(name, ensure_ascii=False)}" for index, name in enumerate(bundle.classes)),
        "",
        "## Licence",
        "",
        "`license` in the metadata above, if it is there, is the licence of the adapter. The base model has its own "
        "licence, and is not part of this folder.",
    ]


def _results(result: Result | None) -> list[str]:
    if result is None:
        return ["No accuracy was reported: the devices have not measured this adapter, or the run is private."]
    among = "all classes" if result.split == "test" else "the classes that the device holds"
    return [
        f"Accuracy {result.accuracy:.1%} on {result.split} samples.",
        "",
        f"Measured on the adapter that round {result.round} announced, by {result.devices} devices: each on its own "
        f"{result.split} samples, among {among}; averaged with the devices' numbers of samples as weights. The "
        "samples are not public, so the figure says how well the adapter fits these devices, and is not comparable "
        "with a public benchmark.",
    ]
