"""A training step of ViT-B/16 on the emulated board in 1 GiB of address space.

The kernel limits the address space of the whole qemu process (RLIMIT_AS), including translated code. (qemu-user ignores
a limit that the emulated process sets.) glibc gets one arena, because each arena reserves 64 MiB of addresses.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.arm64.board import Board
from support.arm64.bundles import export
from support.samples import CLASSES, write_device_photos

LIMIT = 2**30
LEVEL = 2
TOLERANCE = 1e-4
ONE_STEP = Path(__file__).parents[1] / "support" / "arm64" / "one_step.py"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("bundle") / "vit-b16", "vit-b16", "random", levels=LEVEL)


def test_a_training_step_of_vit_b_16_fits(
    board: Board, bundle: Path, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    """The step also equals the host's. With --full an image passes through the backbone first, which takes minutes."""
    shutil.copytree(bundle, board.path("/one/bundle"))
    shutil.copy(ONE_STEP, board.path("/one"))
    write_device_photos(board.path("/one/photos"), {CLASSES[0]: 1}, seed=0)
    image = [f"photos/{CLASSES[0]}/00.jpg"] if pytestconfig.getoption("--full") else []
    program = ["one_step.py", "bundle", str(LEVEL), "emulated.npz", *image]
    script = f"cd /one && exec prlimit --as={LIMIT} python3 {' '.join(program)}"
    output = board.run("sh", "-c", script, MALLOC_ARENA_MAX="1")
    peak = re.search(r"VmPeak:\s*(\d+) kB", output)
    assert peak
    assert int(peak[1]) * 1024 <= LIMIT
    program = [str(ONE_STEP), "bundle", str(LEVEL), "here.npz", *image]
    subprocess.run([sys.executable, *program], cwd=board.path("/one"), check=True, stdout=subprocess.DEVNULL)
    emulated, here = (np.load(board.path(f"/one/{name}.npz")) for name in ("emulated", "here"))
    for name in ("hidden", "loss", "step"):
        assert np.abs(emulated[name] - here[name]).max() < TOLERANCE
    assert np.abs(here["step"]).max() > 5 * TOLERANCE
