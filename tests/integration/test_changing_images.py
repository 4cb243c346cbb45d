"""Images are added to and removed from a device's folder during a run."""

from __future__ import annotations

import os
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

from support.held_round import FIRST, HOLDER, finished_rounds, hold_in_mid_round, start_all
from support.processes import Broker, Federation, Observer, Processes
from support.samples import write_device_photos

from edge_runtime.store import DeviceStore
from fedfmsl.protocol.messages import Ack, DeviceStatus, Stage

LONG_AGO = 1_600_000_000


def change(folder: Path, scratch: Path) -> None:
    """Adds ten photos of a class, a new class, a corrupt file and a duplicate; removes two photos."""
    write_device_photos(scratch, {"kiwi": 10, "lemon": 10}, seed=7)
    for path in scratch.rglob("*.jpg"):
        os.utime(path, (LONG_AGO, LONG_AGO))
        (folder / path.parent.name).mkdir(exist_ok=True)
        shutil.copy2(path, folder / path.parent.name / f"new-{path.name}")
    (folder / "lemon" / "torn.jpg").write_bytes(b"no image")
    shutil.copy2(folder / "kiwi" / "00.jpg", folder / "apple" / "again.jpg")
    os.utime(folder / "lemon" / "torn.jpg", (LONG_AGO, LONG_AGO))
    for path in sorted((folder / "apple").glob("0*.jpg"))[:2]:
        path.unlink()


def test_added_images_are_used_from_the_next_round_on_and_removed_ones_are_not(
    broker: Broker, bundle: Path, photos: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(photos[FIRST], tmp_path / "photos")
    two = {FIRST: folder, HOLDER: photos[HOLDER]}
    with Processes(tmp_path / "logs") as processes, Observer(broker, "changing") as observer:
        federation = Federation("changing", broker, bundle, two, tmp_path, processes)
        start_all(federation)
        begun = hold_in_mid_round(federation, observer)
        observer.wait(Ack, lambda a: (a.device, a.round) == (FIRST, begun.round), f"the answer to {FIRST}")
        change(folder, tmp_path / "new")
        federation.devices[HOLDER].resume()
        rounds = finished_rounds(federation, observer)
        said = federation.devices[FIRST].stdout + federation.devices[FIRST].wait().stderr
    samples = {line["round"]["round"]: line["updates"][FIRST]["samples"] for line in rounds}
    trained = {line["round"]["round"] for line in rounds if line["round"]["stage"] == Stage.GLOBAL.value}
    assert samples[begun.round] == 12  # of ten and ten, 2 of each tested on and 2 held out
    assert {samples[number] for number in trained if number > begun.round} == {samples[begun.round + 1]}
    assert samples[begun.round + 1] > 20
    last = [m for m in observer.seen if isinstance(m, DeviceStatus) and m.device == FIRST and m.online][-1]
    assert last.train + last.held_out + last.test == 20 + 20 - 2 - 1
    assert f"{folder / 'lemon' / 'torn.jpg'}: not a readable image" in said
    again = f"{folder / 'apple' / 'again.jpg'}: the same content is in another class"
    assert again in said and f"({folder / 'kiwi' / '00.jpg'}, of class 'kiwi')" in said
    with closing(sqlite3.connect(DeviceStore(federation.state(FIRST)).samples)) as ledger:
        counts = dict(ledger.execute("SELECT slice, count(*) FROM slices GROUP BY slice"))
    assert sum(counts.values()) == 20 + 20
    assert counts["test"] >= last.test == rounds[-1]["updates"][FIRST]["samples"]
