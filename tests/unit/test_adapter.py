"""The global expert as a PEFT adapter gives the same logits in torch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModel, PeftModel
from support.bundles import Built, as_input, random_samples, random_theta, relative_error, run_graph
from support.samples import CLASSES
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    CLIPVisionModelWithProjection,
    DeiTForImageClassification,
)

from export.families.clip import CLIPVisionClassifier
from export.reference import torch_inputs
from fedfmsl.common.whole_folder import write_folder
from trainer_server.storage.peft_adapter import adapter_files

LEVEL = 2
BASES = {
    "vit": AutoModelForImageClassification,
    "dinov2": AutoModelForImageClassification,
    "deit": DeiTForImageClassification,
    "clip": CLIPVisionClassifier,
    "bert": AutoModelForSequenceClassification,
}


@pytest.fixture
def adapter(built: Built, tmp_path: Path) -> Path:
    write_folder(tmp_path / "adapter", adapter_files(built.bundle, random_theta(built.bundle, LEVEL, seed=8), LEVEL))
    return tmp_path / "adapter"


def our_logits(built: Built) -> torch.Tensor:
    samples, theta = random_samples(built, 3, seed=4), random_theta(built.bundle, LEVEL, seed=8)
    (hidden,) = run_graph(built.bundle, "features.onnx", [f"hidden_{LEVEL}"], **as_input(built, samples))
    (logits,) = run_graph(built.bundle, f"predict-{LEVEL}.onnx", ["logits"], hidden=hidden, theta=theta)
    return torch.from_numpy(logits)


def inputs_of(built: Built) -> dict[str, torch.Tensor]:
    return torch_inputs(random_samples(built, 3, seed=4), built.bundle.manifest.preprocessing)


def test_logits_of_adapter_and_graphs_are_equal(built: Built, adapter: Path) -> None:
    """Also for a base with a head of other classes, which all tiny models have."""
    manifest = built.bundle.manifest
    assert built.source.origin is not None
    folder, head = built.source.origin.source, {"num_labels": len(CLASSES), "ignore_mismatched_sizes": True}
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == Path(folder).name
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": folder}))
    base = BASES[manifest.family].from_pretrained(folder, **head)
    allowed = ["export"] if manifest.family == "clip" else None
    for model in (
        PeftModel.from_pretrained(base, adapter),
        AutoPeftModel.from_pretrained(str(adapter), import_allowlist=allowed, **head),
    ):
        with torch.no_grad():
            logits = model.eval()(**inputs_of(built)).logits
        assert relative_error(our_logits(built).numpy(), logits.numpy()) < 1e-5


@pytest.mark.parametrize("built", ["clip"], indirect=True)
def test_clips_adapter_fits_the_class_of_transformers_too(built: Built, adapter: Path) -> None:
    assert built.source.origin is not None
    base = CLIPVisionModelWithProjection.from_pretrained(built.source.origin.source)
    base.classifier = torch.nn.Linear(base.config.projection_dim, len(CLASSES))
    model = PeftModel.from_pretrained(base, adapter).eval()
    with torch.no_grad():
        logits = model.base_model.model.classifier(model(**inputs_of(built)).image_embeds)
    assert relative_error(our_logits(built).numpy(), logits.numpy()) < 1e-5
