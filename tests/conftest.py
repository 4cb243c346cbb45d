"""Fixtures of every kind of test, each made once per session. What they are made of is in `support`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from support.builds import (
    Built,
    build,
    write_bert,
    write_clip,
    write_deit,
    write_dinov2,
    write_photos,
    write_texts,
    write_vit,
)

os.environ["HF_HUB_OFFLINE"] = "1"  # of the processes that tests start; no test talks to the hub
torch.set_num_threads(1)  # tiny models: more threads only wait for each other


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="the long form of tests/faults (make faults), not the short")


@pytest.fixture(scope="session")
def vit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random ViT as a transformers folder."""
    return write_vit(tmp_path_factory.mktemp("weights") / "tiny-vit")


@pytest.fixture(scope="session")
def dinov2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random DINOv2 as a transformers folder; a bundle of it needs its positions interpolated."""
    return write_dinov2(tmp_path_factory.mktemp("weights") / "tiny-dinov2")


@pytest.fixture(scope="session")
def vit(vit_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The ViT's bundle at every level. Read only: copy it to change it."""
    return build(vit_folder, tmp_path_factory.mktemp("bundles") / "vit")


@pytest.fixture(scope="session")
def dinov2(dinov2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The DINOv2's bundle at every level. Read only: copy it to change it."""
    return build(dinov2_folder, tmp_path_factory.mktemp("bundles") / "dinov2")


@pytest.fixture(scope="session")
def deit(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A DeiT's bundle at every level. Read only: copy it to change it."""
    return build(write_deit(tmp_path_factory.mktemp("weights") / "tiny-deit"), tmp_path_factory.mktemp("bundles") / "d")


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random CLIP as a transformers folder."""
    return write_clip(tmp_path_factory.mktemp("weights") / "tiny-clip")


@pytest.fixture(scope="session")
def clip(clip_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The CLIP's bundle at every level. Read only: copy it to change it."""
    return build(clip_folder, tmp_path_factory.mktemp("bundles") / "clip")


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random BERT, with its tokenizer, as a transformers folder."""
    return write_bert(tmp_path_factory.mktemp("weights") / "tiny-bert")


@pytest.fixture(scope="session")
def bert(bert_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The BERT's bundle at every level. Read only: copy it to change it."""
    return build(bert_folder, tmp_path_factory.mktemp("bundles") / "bert")


@pytest.fixture(scope="session", params=["vit", "dinov2", "deit", "clip", "bert"])
def built(request: pytest.FixtureRequest) -> Built:
    """Each family's bundle in turn."""
    made: Built = request.getfixturevalue(request.param)
    return made


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten photos of each class. Read only: copy it to change it."""
    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten texts of each class. Read only: copy it to change it."""
    return write_texts(tmp_path_factory.mktemp("texts"))
