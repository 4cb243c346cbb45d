"""CLIP (Radford et al. 2021): the vision tower. Its feature is the class token's projection into the common space of
images and texts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from transformers import CLIPTextModelWithProjection, CLIPVisionModel, CLIPVisionModelWithProjection
from transformers.modeling_outputs import ImageClassifierOutput

from export.families.family import Family, affine, array, native_geometry
from export.graph import Array
from export.transformer import Geometry


class CLIPVisionClassifier(CLIPVisionModelWithProjection):  # type: ignore[misc]
    """A linear `classifier` on CLIP's image embedding (F,).

    transformers' CLIPForImageClassification averages the patches instead. `from_pretrained` reads the vision tower of a
    whole CLIP model. Without this class, a CLIPVisionModelWithProjection with an additional `classifier` of
    torch.nn.Linear(F, C) is the same base for PEFT. Call the classifier on `image_embeds` then.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.classifier = torch.nn.Linear(config.projection_dim, config.num_labels)

    def forward(self, pixel_values: torch.Tensor, **options: Any) -> ImageClassifierOutput:
        outputs = super().forward(pixel_values, **options)
        return ImageClassifierOutput(logits=self.classifier(outputs.image_embeds), hidden_states=outputs.hidden_states)


class CLIPTextTower(CLIPTextModelWithProjection):  # type: ignore[misc]
    """CLIP's text embedding (F,), and the log of CLIP's scale for cosines of images and texts."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.logit_scale = torch.nn.Parameter(torch.zeros(()))


def _geometry(config: Any, size: int) -> Geometry:
    return replace(native_geometry(config, size), feature=config.projection_dim)


def _outer(model: Any, size: int) -> dict[str, Array]:
    tower = model.vision_model
    position = array(tower.embeddings.position_embedding.weight)[None].copy()
    position[:, 0] += array(tower.embeddings.class_embedding)
    return {
        **affine("patch", tower.embeddings.patch_embedding),
        "position": position,
        **affine("embed_norm", tower.pre_layrnorm),
        **affine("norm", tower.post_layernorm),
        **affine("projection", model.visual_projection),
    }


def _optimum_model(model: Any) -> CLIPVisionModel:
    with torch.device("meta"):
        tower = CLIPVisionModel(model.config)
    tower.vision_model = model.vision_model
    return tower


CLIP = Family(
    model_type="clip",
    reference=CLIPVisionClassifier,
    backbone="vision_model",
    layers="encoder.layers",
    block_keys={
        "norm1": "layer_norm1",
        "query": "self_attn.q_proj",
        "key": "self_attn.k_proj",
        "value": "self_attn.v_proj",
        "output": "self_attn.out_proj",
        "norm2": "layer_norm2",
        "up": "mlp.fc1",
        "down": "mlp.fc2",
    },
    geometry=_geometry,
    outer=_outer,
    optimum_model=_optimum_model,
    text_tower=CLIPTextTower,
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
)
