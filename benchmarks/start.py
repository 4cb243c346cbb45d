"""python -m benchmarks.start: processor time that people wait for: help texts, and the start of a daemon.

A daemon has started when it waits for a round. The first start reads every photo and measures the machine. The next one
finds bundle, photos and measurements unchanged.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import psutil
import typer
from PIL import Image

from benchmarks.step import bundle_of
from devices.trial.processes import free_port, wait_for_port
from edge_runtime.store import DeviceStore
from fedfmsl.common.cli import application
from fedfmsl.errors import RunError
from fedfmsl.protocol.bundle import Bundle
from fedfmsl.protocol.task import Task

CLASSES = 10
SIDE = 64  # pixels; a photo is read in the first start only
BROKER_SECONDS = 60.0
READY = "level cap", "waiting for the server"  # in this order in the daemon's log, once it is ready
HELP = [("fedfmsl", 0.3), ("edge_runtime", 0.3), ("trainer_server", 0.3)]  # modules, and seconds that are aimed at
NEXT_START = 2.0  # seconds that are aimed at

app = application()


@app.command()
def start(
    bundle: Path | None = typer.Option(None, help="Bundle of the device. Default: ViT-B/16 with random weights."),
    photos: int = typer.Option(10_000, min=CLASSES, help="Photos of the device."),
    repeats: int = typer.Option(3, min=1, help="Starts of each command, of which the quickest counts."),
) -> None:
    """Measure the processor time of starts."""
    print("| command | processor, s | target |\n|---|---|---|")
    for module, target in HELP:
        spent = min(_seconds_of([sys.executable, "-m", module, "--help"]) for _ in range(repeats))
        print(f"| `python -m {module} --help` | {spent:.2f} | {target} |", flush=True)
    root = bundle or bundle_of("vit-b16", "random", "fp32")
    with tempfile.TemporaryDirectory() as folder:
        images, state, port = Path(folder) / "images", Path(folder) / "state", free_port()
        state.mkdir()
        _write_photos(images, photos)
        opened = Bundle.load(root)
        DeviceStore(state).tasks.keep(Task(opened.sha256, tuple(path.name for path in sorted(images.iterdir()))))
        broker = subprocess.Popen([sys.executable, "-m", "devices.trial.broker", "--port", str(port)])
        try:
            if not wait_for_port(port, broker, BROKER_SECONDS):
                raise RunError("the broker did not start; see its output above")
            command = [sys.executable, "-m", "edge_runtime", "run", "--run", "start", "--device", "d"]
            command += ["--images", str(images), "--state", str(state), "--bundle", str(root)]
            command += ["--broker", f"mqtt://127.0.0.1:{port}"]
            size = sum(entry.size for entry in opened.manifest.files.values()) / 1e6
            what = f"daemon, {photos} photos, bundle of {size:.0f} MB"
            print(f"| {what}: first start | {_seconds_until_ready(command):.2f} | |", flush=True)
            spent = min(_seconds_until_ready(command) for _ in range(repeats))
            print(f"| {what}: next start | {spent:.2f} | {NEXT_START} |")
        finally:
            broker.terminate()
            broker.wait()


def _seconds_of(command: Sequence[str]) -> float:
    """Of the processor, until the command ends."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status):
        raise RunError(f"{' '.join(command)} failed; see its output above")
    return used.ru_utime + used.ru_stime


def _seconds_until_ready(command: Sequence[str]) -> float:
    """Of the processor, by the daemon and processes that it has started, until it waits for a round."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        text = ""
        for line in process.stdout:
            text += line
            if all(part in text for part in READY):
                times = psutil.Process(process.pid).cpu_times()
                process.terminate()
                return float(times.user + times.system + times.children_user + times.children_system)
    raise RunError(f"the daemon ended before it was ready: {text}")


def _write_photos(folder: Path, count: int) -> None:
    """One-coloured JPEG files, all different, in one folder per class."""
    for index in range(CLASSES):
        (folder / f"class-{index}").mkdir(parents=True)
    for index in range(count):
        image = Image.new("RGB", (SIDE, SIDE), (index >> 8, index & 255, index % CLASSES))
        comment = str(index).encode()  # two colours may give the same pixels
        image.save(folder / f"class-{index % CLASSES}" / f"{index:05}.jpg", comment=comment)
    for path in folder.rglob("*.jpg"):  # as if they were not written just now
        os.utime(path, (1e9, 1e9))


if __name__ == "__main__":
    app()
