"""A text bundle's graphs, compared with transformers and PEFT. Rows of zeros replace the attention mask."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.bundles import LAYERS, MAX_TOKENS, Built, random_theta, relative_error, run_graph
from support.samples import CLASSES
from support.torch_reference import torch_expert

from export.reference import loss_and_gradient, torch_inputs

TOLERANCE = 1e-5
LEVELS = [1, 2, LAYERS]
CLS, SEP = 2, 3
LENGTHS = [MAX_TOKENS, 3, 2, 7]


def texts_of(lengths: list[int], seed: int, pad: int = 0) -> np.ndarray:
    """Token ids (B, N): [CLS] … [SEP], then padding."""
    rng = np.random.default_rng(seed)
    tokens = np.full((len(lengths), MAX_TOKENS), pad, np.int64)
    for row, length in zip(tokens, lengths, strict=True):
        row[:length] = [CLS, *rng.integers(4, 32, length - 2), SEP]
    return tokens


def hidden_of(bert: Built, tokens: np.ndarray, level: int) -> np.ndarray:
    return run_graph(bert.bundle, "features.onnx", [f"hidden_{level}"], tokens=tokens)[0]


def logits_of(bert: Built, tokens: np.ndarray, theta: np.ndarray, level: int) -> np.ndarray:
    hidden = hidden_of(bert, tokens, level)
    return run_graph(bert.bundle, f"predict-{level}.onnx", ["logits"], hidden=hidden, theta=theta)[0]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("lengths", [LENGTHS, [MAX_TOKENS] * 3, [2], [3, 2, 4]], ids=str)
def test_padded_and_full_texts_equal_torch_and_peft_with_an_attention_mask(
    bert: Built, level: int, lengths: list[int]
) -> None:
    tokens, theta = texts_of(lengths, seed=level), random_theta(bert.bundle, level, 1)
    labels, manifest = np.arange(len(lengths)) % len(CLASSES), bert.bundle.manifest
    loss, gradient, logits = loss_and_gradient(
        bert.source,
        manifest.lora,
        manifest.peft,
        bert.bundle.expert,
        level,
        theta,
        torch_inputs(tokens, manifest.preprocessing),
        torch.from_numpy(labels),
    )
    our_loss, our_gradient = run_graph(
        bert.bundle,
        f"step-{level}.onnx",
        ["loss", "gradient"],
        hidden=hidden_of(bert, tokens, level),
        labels=labels,
        weights=np.full(len(labels), 1 / len(labels), np.float32),
        gate=np.zeros(len(labels), np.float32),
        other=np.full(len(labels), -1e4, np.float32),
        bias=np.zeros(len(CLASSES), np.float32),
        theta=theta,
    )
    assert relative_error(float(our_loss), loss) < TOLERANCE
    assert relative_error(logits_of(bert, tokens, theta, level), logits) < TOLERANCE
    for name, part in bert.bundle.expert.split(gradient).items():
        assert relative_error(bert.bundle.expert.split(our_gradient)[name], part) < TOLERANCE, name


@pytest.mark.parametrize("level", LEVELS)
def test_padding_does_not_change_the_logits_of_a_text(bert: Built, level: int) -> None:
    tokens, theta = texts_of(LENGTHS, seed=3), random_theta(bert.bundle, level, 2)
    ours = logits_of(bert, tokens, theta, level)
    with torch_expert(bert, theta) as model, torch.no_grad():
        for row, length, logits in zip(tokens, LENGTHS, ours, strict=True):
            alone = model(input_ids=torch.from_numpy(row[None, :length])).logits.numpy()[0]
            assert relative_error(logits, alone) < TOLERANCE


def test_exactly_the_rows_of_padded_tokens_are_zero_at_every_level(bert: Built) -> None:
    tokens = texts_of(LENGTHS, seed=4)
    real = tokens != 0
    for level in LEVELS:
        hidden = hidden_of(bert, tokens, level)
        assert np.array_equal(np.any(hidden != 0, axis=2), real)
        if level < LAYERS:
            block = LAYERS - level - 1
            lora = random_theta(bert.bundle, LAYERS, 3)[bert.bundle.expert.parts[str(block)]]
            below = hidden_of(bert, tokens, level + 1)
            (lifted,) = run_graph(bert.bundle, f"lift-{block}.onnx", ["lifted"], hidden=below, theta=lora)
            assert np.array_equal(np.any(lifted != 0, axis=2), real)


def test_hidden_states_of_real_tokens_equal_transformers(bert: Built) -> None:
    tokens = texts_of(LENGTHS, seed=5)
    with torch.no_grad():
        inputs = torch_inputs(tokens, bert.bundle.manifest.preprocessing)
        states = bert.source.backbone(**inputs, output_hidden_states=True).hidden_states
    real = tokens != 0
    for level in LEVELS:
        assert relative_error(hidden_of(bert, tokens, level)[real], states[LAYERS - level].numpy()[real]) < TOLERANCE


def test_hidden_states_in_half_precision_keep_their_padding(bert: Built) -> None:
    tokens, theta = texts_of(LENGTHS, seed=6), random_theta(bert.bundle, LAYERS, 4)
    hidden = hidden_of(bert, tokens, LAYERS)
    half = hidden.astype(np.float16).astype(np.float32)
    assert np.array_equal(half == 0, hidden == 0)
    exact, rounded = (
        run_graph(bert.bundle, f"predict-{LAYERS}.onnx", ["logits"], hidden=h, theta=theta)[0] for h in (hidden, half)
    )
    assert relative_error(rounded, exact) < 1e-2


@pytest.mark.parametrize("level", LEVELS)
def test_a_sample_of_padding_only_does_not_change_the_others(bert: Built, level: int) -> None:
    """An engine may pad a batch with zeros."""
    tokens, theta = texts_of(LENGTHS, seed=7), random_theta(bert.bundle, level, 5)
    hidden = hidden_of(bert, tokens, level)
    size = len(LENGTHS)

    def step(extra: int) -> list[np.ndarray]:
        return run_graph(
            bert.bundle,
            f"step-{level}.onnx",
            ["loss", "gradient"],
            hidden=np.concatenate([hidden, np.zeros((extra, *hidden.shape[1:]), np.float32)]),
            labels=np.zeros(size + extra, np.int64),
            weights=np.array([1.0] * size + [0.0] * extra, np.float32),
            gate=np.zeros(size + extra, np.float32),
            other=np.full(size + extra, -1e4, np.float32),
            bias=np.zeros(len(CLASSES), np.float32),
            theta=theta,
        )

    for ours, filled in zip(step(0), step(3), strict=True):
        assert np.isfinite(filled).all()
        assert relative_error(filled, ours) < TOLERANCE


def test_the_personalized_graph_ignores_padding(bert: Built) -> None:
    bundle, theta = bert.bundle, random_theta(bert.bundle, 2, 6)
    tokens = texts_of(LENGTHS, seed=8)
    bias = np.zeros(len(CLASSES), np.float32)
    probabilities = run_graph(
        bundle,
        "personal-2.onnx",
        ["probabilities"],
        tokens=tokens,
        gate_theta=bundle.initial()[1],
        global_theta=theta,
        local_theta=theta,
        kept_bias=bias,
        given_bias=bias,
        held_bias=bias,
        temperature=np.ones(1, np.float32),
    )[0]
    logits = torch.from_numpy(logits_of(bert, tokens, theta, 2))
    assert np.allclose(probabilities, torch.softmax(logits, dim=1), atol=1e-6)
