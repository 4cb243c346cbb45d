"""Tiny backbones with random weights, written as transformers folders. None of their weights is zero or one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
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

from fedfmsl.protocol.bundle import TOKENIZER
from support.bundles import FEATURE, IMAGE_SIZE, LAYERS, MAX_TOKENS
from support.samples import WORDS

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
_SHAPE: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": LAYERS, "patch_size": 8, "num_labels": 2}
_LETTERS = "abcdefghijklmnopqrstuvwxyz.-"

torch.set_num_threads(1)  # the models are tiny: a second thread costs more than it computes


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


def write_tokenizer(path: Path) -> Path:
    """A tokenizer of whole words as BERT's is built: [CLS] … [SEP], [PAD] is 0."""
    tokenizer = Tokenizer(WordLevel({token: i for i, token in enumerate((*SPECIAL, ".", *WORDS))}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save(str(path))
    return path
