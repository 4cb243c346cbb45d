"""What tests of every kind are made of: tiny backbones with nothing trivial in their weights, their bundles, photos."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft.utils import set_peft_model_state_dict
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import BertProcessing
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    CLIPConfig,
    CLIPModel,
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from edge_runtime.engines.sessions import open_session, run
from export import reference
from export.build import build_bundle
from export.reference import peft_model, torch_inputs
from export.weights import Backbone, load_backbone
from export.zero_shot import TEMPLATES, zero_shot_head
from fedfmsl.algorithms.arrays import Vector
from fedfmsl.common.onnx_runtime import has_ort_training
from fedfmsl.protocol.bundle import TOKENIZER, Bundle, Precision
from fedfmsl.protocol.peft_names import from_peft, to_peft

CLASSES = ("apple", "kiwi", "lemon", "plum")
IMAGE_SIZE = 32
LAYERS = 3
MAX_TOKENS = 12
RANK = 4
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
_SHAPE: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": LAYERS, "patch_size": 8, "num_labels": 2}

_LETTERS = "abcdefghijklmnopqrstuvwxyz.-"
FEATURE = 20  # of CLIP

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Built:
    """A bundle and the torch model it was made of."""

    source: Backbone
    bundle: Bundle


def write_vit(folder: Path, seed: int = 0, **config: Any) -> Path:
    """A random ViT as a transformers folder; `config` overrides its shape."""
    shape = {**_SHAPE, "num_attention_heads": 2, "image_size": IMAGE_SIZE, "intermediate_size": 64, **config}
    return _save(ViTForImageClassification(ViTConfig(**shape)), folder, seed)


def write_dinov2(folder: Path, seed: int = 0, **config: Any) -> Path:
    """A random DINOv2 as a transformers folder, trained, as it were, on larger images than it is exported for."""
    shape = {**_SHAPE, "num_attention_heads": 4, "image_size": IMAGE_SIZE + 8, "mlp_ratio": 2, **config}
    return _save(Dinov2ForImageClassification(Dinov2Config(**shape)), folder, seed)


def write_bert(folder: Path, seed: int = 0, **config: Any) -> Path:
    """A random BERT as a transformers folder, with its tokenizer."""
    shape = {**_SHAPE, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 32, **config}
    model = BertForSequenceClassification(BertConfig(max_position_embeddings=MAX_TOKENS + 4, **shape))
    write_tokenizer(_save(model, folder, seed) / TOKENIZER)
    return folder


def write_deit(folder: Path, seed: int = 0) -> Path:
    """A random DeiT as a transformers folder."""
    shape = {**_SHAPE, "num_attention_heads": 2, "image_size": IMAGE_SIZE, "intermediate_size": 64}
    return _save(DeiTForImageClassification(DeiTConfig(**shape)), folder, seed)


def write_clip(folder: Path, seed: int = 0) -> Path:
    """A random CLIP, both towers, as a transformers folder with a tokenizer of letters. Its features are narrower than
    its hidden state."""
    vision = {**_SHAPE, "num_attention_heads": 2, "image_size": IMAGE_SIZE, "intermediate_size": 64}
    end = 2 * len(_LETTERS) + 1
    text = {
        "vocab_size": end + 1,
        "bos_token_id": end - 1,
        "eos_token_id": end,
        "pad_token_id": end,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 40,
    }
    towers = {
        "vision_config": {**vision, "projection_dim": FEATURE},
        "text_config": {**text, "projection_dim": FEATURE},
    }
    _save(CLIPModel(CLIPConfig(**towers, projection_dim=FEATURE)), folder, seed)
    tokens = [*_LETTERS, *(f"{letter}</w>" for letter in _LETTERS), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    return folder


def _save(model: Any, folder: Path, seed: int) -> Path:
    """Every parameter is drawn anew, so that none is accidentally one or zero, and no activation is tiny."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("lambda1") or ("norm" in name.lower() and name.endswith("weight")):
                parameter.copy_(1 + 0.3 * noise)
            elif parameter.ndim < 2:
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    model.save_pretrained(folder)
    return folder


def build(
    weights: Path,
    out: Path,
    levels: int | None = None,
    classes: Sequence[str] = CLASSES,
    seed: int = 0,
    precision: Precision = "fp32",
) -> Built:
    """The bundle of a transformers folder, at IMAGE_SIZE or MAX_TOKENS; with a zero-shot head where there is a text
    tower, and for onnxruntime-training where that is what the tests run with."""
    size = MAX_TOKENS if (weights / TOKENIZER).is_file() else IMAGE_SIZE
    source = load_backbone(str(weights), None, len(classes), size, None, seed)
    zero_shot = zero_shot_head(source, classes, TEMPLATES) if source.family.text_tower else None
    lora = source.family.lora(RANK)
    ort_training = precision == "fp32" and has_ort_training()
    for _ in build_bundle(source, tuple(classes), levels, lora, out, seed, precision, zero_shot, ort_training):
        pass
    return Built(source, Bundle(out))


def write_photos(folder: Path, per_class: int = 10, classes: Sequence[str] = CLASSES, seed: int = 0) -> Path:
    """FOLDER/<class>/NN.jpg: each class has its own colour and stripes, each photo its own noise and size."""
    rng = np.random.default_rng(seed)
    for label, name in enumerate(classes):
        angle = 2 * np.pi * label / len(classes)
        colour = 128 + 90 * np.cos(angle + np.array([0.0, 2.1, 4.2]))
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(per_class):
            height, width = rng.integers(36, 56, 2)
            rows, columns = np.mgrid[:height, :width]
            stripes = 30 * np.sin((rows * np.cos(angle) + columns * np.sin(angle)) / 3 + rng.uniform(0, 6))
            image = colour + stripes[..., None] + rng.normal(0, 12, (height, width, 3))
            pixels = np.clip(image, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index:02}.jpg", quality=92)
    return folder


WORDS = ("a", "big", "ripe", "sweet", "basket", "of", "from", "the", "tree", *CLASSES)


def write_texts(folder: Path, per_class: int = 10, classes: Sequence[str] = CLASSES, seed: int = 0) -> Path:
    """FOLDER/<class>/NN.txt: between 3 and 40 words, in which those of its class are more frequent."""
    rng = np.random.default_rng(seed)
    for name in classes:
        odds = np.array([5.0 if word == name else 1.0 for word in WORDS])
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(per_class):
            words = rng.choice(WORDS, rng.integers(3, 40), p=odds / odds.sum())
            (folder / name / f"{index:02}.txt").write_text(f"{' '.join(words)}.\n")
    return folder


def write_tokenizer(path: Path) -> Path:
    """A tokenizer of whole words as BERT's is built: [CLS] … [SEP], [PAD] is 0."""
    tokenizer = Tokenizer(WordLevel({token: i for i, token in enumerate((*SPECIAL, ".", *WORDS))}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save(str(path))
    return path


def random_samples(built: Built, size: int, seed: int) -> NDArray[Any]:
    """`size` samples as the bundle's graphs take them, pixels (B, S, S, 3) or tokens (B, N)."""
    preprocessing = built.bundle.manifest.preprocessing
    return reference.random_samples(built.source, preprocessing, size, np.random.default_rng(seed))


def as_input(built: Built, samples: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """Under the name that the bundle's graphs have for them."""
    return {built.source.family.input: samples}


def random_theta(bundle: Bundle, level: int, seed: int) -> Vector:
    """Trainables of a level, none of them zero."""
    theta = bundle.initial()[0][: bundle.expert.size(level)]
    return np.asarray(theta + np.random.default_rng(seed).normal(0, 0.1, theta.size), np.float32)


def run_graph(bundle: Bundle, name: str, outputs: Sequence[str], **inputs: NDArray[Any]) -> list[Floats]:
    return run(open_session(bundle, name, threads=1), list(outputs), inputs)


def hidden_of(built: Built, samples: NDArray[Any], level: int) -> Floats:
    """Hidden states below the suffix of a level, nothing trained underneath (B, N, D)."""
    return run_graph(built.bundle, "features.onnx", [f"hidden_{level}"], **as_input(built, samples))[0]


def torch_step(
    built: Built, theta: Vector, samples: NDArray[Any], loss_of: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[float, Vector]:
    """The loss that `loss_of` makes of the logits of the whole model, torch + PEFT, and its gradient (P,)."""
    bundle, spec = built.bundle, built.bundle.manifest.peft
    with torch_expert(built, theta) as model:
        loss = loss_of(model(**torch_inputs(samples, bundle.manifest.preprocessing)).logits)
        loss.backward()
        gradients = {name: tensor.grad.numpy() for name, tensor in trainables(model).items()}
    return loss.item(), bundle.expert.join(from_peft(spec, gradients))


class torch_expert:  # noqa: N801 - a context manager
    """torch + PEFT over the whole model, with the trainables `theta` (P,) of whatever level."""

    def __init__(self, built: Built, theta: Vector) -> None:
        bundle = built.bundle
        level = next(k for k in range(bundle.manifest.levels + 1) if bundle.expert.size(k) == theta.size)
        self._context = peft_model(built.source, bundle.manifest.lora, level, seed=0)
        tensors = to_peft(bundle.manifest.peft, bundle.expert.split(theta))
        self._state = {key: torch.from_numpy(tensor.copy()) for key, tensor in tensors.items()}

    def __enter__(self) -> Any:
        model = self._context.__enter__()
        set_peft_model_state_dict(model, self._state)
        return model

    def __exit__(self, *reason: Any) -> None:
        self._context.__exit__(*reason)


def features_of(built: Built, samples: NDArray[Any]) -> Floats:
    """What transformers gives the classifier, of it the part that ours reads (B, F)."""
    seen: list[torch.Tensor] = []
    hook = built.source.model.classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        built.source.model(**torch_inputs(samples, built.bundle.manifest.preprocessing))
    hook.remove()
    return seen[0][:, : built.bundle.manifest.dims.feature].numpy()


def hidden_states(model: Any, inputs: Mapping[str, torch.Tensor]) -> list[Floats]:
    """A torch model's states (B, N, D) below each block and above the last, with zeros for padded tokens as in ours."""
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
    real = inputs["attention_mask"][..., None] if "attention_mask" in inputs else 1
    return [(state * real).numpy() for state in states]


def trainables(model: Any) -> dict[str, Any]:
    """A PEFT model's trainable parameters under the names of `adapter_model.safetensors`."""
    return {
        name.replace(".default", "").replace(".modules_to_save", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def relative_error(ours: NDArray[Any] | float, theirs: NDArray[Any] | float) -> float:
    """The largest difference, as a share of the largest value."""
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())
