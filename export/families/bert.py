"""BERT (Devlin et al. 2019) and text encoders of the same architecture, such as MiniLM: post-norm blocks and a pooler.

A text has one segment. The embedding of its token type is therefore constant and added to "position".
"""

from __future__ import annotations

from typing import Any

from transformers import BertForSequenceClassification

from export.families.family import Family, affine, array
from export.graph import Array
from export.transformer import Geometry
from fedfmsl.errors import ConfigError


def _geometry(config: Any, size: int) -> Geometry:
    if config.hidden_act != "gelu" or config.position_embedding_type != "absolute" or config.is_decoder:
        raise ConfigError("only BERT encoders with absolute positions and the activation 'gelu' are supported")
    if size > config.max_position_embeddings:
        raise ConfigError(
            f"--max-tokens {size} is more than the {config.max_position_embeddings} positions of the model; lower it"
        )
    return Geometry(
        tokens=size,
        hidden=config.hidden_size,
        feature=config.hidden_size,
        blocks=config.num_hidden_layers,
        heads=config.num_attention_heads,
        norm_eps=config.layer_norm_eps,
        norm="post",
    )


def _outer(model: Any, size: int) -> dict[str, Array]:
    embeddings = model.bert.embeddings
    position = array(embeddings.position_embeddings.weight)[:size] + array(embeddings.token_type_embeddings.weight)[0]
    return {
        "words": array(embeddings.word_embeddings.weight),
        "position": position[None],
        **affine("embed_norm", embeddings.LayerNorm),
        **affine("pooler", model.bert.pooler.dense),
    }


BERT = Family(
    model_type="bert",
    reference=BertForSequenceClassification,
    backbone="bert",
    layers="encoder.layer",
    block_keys={
        "query": "attention.self.query",
        "key": "attention.self.key",
        "value": "attention.self.value",
        "output": "attention.output.dense",
        "norm1": "attention.output.LayerNorm",
        "up": "intermediate.dense",
        "down": "output.dense",
        "norm2": "output.LayerNorm",
    },
    geometry=_geometry,
    outer=_outer,
    input="tokens",
)
