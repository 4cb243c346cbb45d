"""Reads the records of closed rounds from the run's folder and writes them to trackers, in a thread of its own.

RUN/tracked.json         by tracker: the last round that it has

The records are the source, not the running server: a tracker that was away gets what it missed, also after a restart,
and one that hangs or fails delays no round.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fedfmsl.common.files import write_atomically
from fedfmsl.errors import one_line
from fedfmsl.protocol.messages import Stage
from trainer_server.config import RunConfig
from trainer_server.coordinator.records import RoundSummary
from trainer_server.storage.run_store import RunStore
from trainer_server.tracking.sinks import Origin, Sink, open_sink, require_package

logger = logging.getLogger(__name__)

TRACKED = "tracked.json"
POLL_SECONDS = 5.0
CLOSE_SECONDS = 30.0  # how long the end of the server waits for trackers

Open = Callable[[str, Origin, int], Sink]


def points(closed: RoundSummary) -> dict[str, float]:
    """The figures of a round by name. Accuracies are means over the devices that report them, weighted by samples."""
    figures: dict[str, float] = {
        "round/seconds": closed.seconds,
        "round/level": closed.level,
        "round/updates": closed.answered,
        "round/stragglers": closed.missing,
        "round/bytes_up": closed.bytes_up,
        "round/bytes_down": closed.bytes_down,
        "round/repeated": float(bool(closed.repeated)),
    }
    evaluated = closed.stage is Stage.EVALUATE
    for name, value in closed.means.items():
        shown = re.sub(r"[^\w.-]", "_", name)  # devices choose it
        group, metric = ("test", shown) if evaluated else ("training", shown)
        if shown.startswith("held_out_"):
            group, metric = "held_out", shown.removeprefix("held_out_")
        figures[f"{group}/{metric}"] = value
    return figures


def facts_of(config: RunConfig, model: str) -> dict[str, str]:
    """The settings of a run that a tracker shows beside its figures."""
    return {
        "model": model,
        "devices": str(config.devices),
        "stage1_rounds": str(config.stage1_rounds),
        "stage2_rounds": str(config.stage2_rounds),
        "rule": config.aggregation.rule.value,
        "server_optimizer": config.aggregation.optimizer.value,
        "encoding": config.encoding.value,
        "seed": str(config.seed),
    }


class Tracker:
    """Writes every closed round of a run to all trackers, each round once. `specs`: see `sinks.parse`."""

    def __init__(self, folder: Path, specs: Sequence[str], model: str, open_: Open = open_sink) -> None:
        """Raises ConfigError if a package is missing."""
        for spec in specs:
            require_package(spec)
        self._folder = folder
        self._specs = specs
        self._model = model
        self._open = open_
        self._sinks: dict[str, Sink] = {}
        self._failed: set[str] = set()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="tracker")
        self._thread.start()

    def close(self) -> None:
        """Writes the last rounds and ends. A tracker that hangs is left behind."""
        self._closing.set()
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            logger.warning("the trackers have not answered for %.0f s; the run ends without them", CLOSE_SECONDS)

    def _run(self) -> None:
        store = RunStore(self._folder)  # of this thread
        try:
            while not self._closing.wait(POLL_SECONDS):
                self._write_all(store)
            self._write_all(store)
            for sink in self._sinks.values():
                with contextlib.suppress(Exception):
                    sink.close()
        finally:
            store.close()

    def _write_all(self, store: RunStore) -> None:
        for spec in self._specs:
            try:
                self._write(store, spec)
                self._failed.discard(spec)
            except Exception as error:  # of any library
                if spec not in self._failed:
                    reason = one_line(f"{type(error).__name__}: {error}")
                    logger.warning("--track %s fails (%s); the run goes on, and it gets the rounds later", spec, reason)
                self._failed.add(spec)

    def _write(self, store: RunStore, spec: str) -> None:
        last = self._tracked().get(spec, 0)
        closed = store.rounds.summaries(after=last)
        if not closed:
            return
        if spec not in self._sinks:
            config = store.origin.config
            origin = Origin(config.run, store.origin.first.session, facts_of(config, self._model))
            self._sinks[spec] = self._open(spec, origin, last)
        for summary, _ in closed:
            self._sinks[spec].write(summary.round, points(summary))
            self._save({**self._tracked(), spec: summary.round})

    def _tracked(self) -> dict[str, int]:
        try:
            return dict(json.loads((self._folder / TRACKED).read_bytes()))
        except FileNotFoundError:
            return {}

    def _save(self, tracked: Mapping[str, int]) -> None:
        write_atomically(self._folder / TRACKED, json.dumps(tracked).encode(), durable=True)
