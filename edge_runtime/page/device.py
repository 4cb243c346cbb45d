"""What the page shows about the device, from the files that the daemon writes into the state directory."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from typing import Any

from edge_runtime.daemon.status import check_alive, describe, read_health
from edge_runtime.store import DeviceStore
from fedfmsl.errors import FedFMSLError

LISTED = 500  # skipped files


def state_of(store: DeviceStore) -> Mapping[str, Any]:
    """`facts`: pairs of a label and a text; `problem`: why the daemon does not work, or ""."""
    try:
        health = read_health(store)
    except FedFMSLError as error:
        return {"facts": [], "problem": str(error)}
    problem = ""
    try:
        check_alive(health, store.root)
    except FedFMSLError as error:
        problem = str(error)
    described = describe(health, store, time.time())
    facts = [(label, text) for label, text in described if label not in ("skipped", "")]
    return {"facts": facts, "problem": problem}


def skipped_files(store: DeviceStore) -> tuple[list[str], list[str], int]:
    """The reasons for which files are skipped, the first LISTED files, and how many more there are."""
    text = store.skipped.read_text("utf-8", errors="replace") if store.skipped.is_file() else ""
    lines = iter(text.splitlines())
    reasons = list(itertools.takewhile(bool, lines))
    files = list(lines)
    return reasons, files[:LISTED], max(len(files) - LISTED, 0)
