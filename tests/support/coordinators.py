"""A run of the coordinator without I/O, and devices that answer at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedfmsl.algorithms.class_means import class_sums
from fedfmsl.algorithms.discriminant import second_moments
from fedfmsl.algorithms.privacy import Privacy
from fedfmsl.algorithms.sal import CapabilityQueue, Sal
from fedfmsl.protocol.messages import DeviceStatus, Round, Stage, Sums, Update, Verdict
from fedfmsl.protocol.tensors import blob_hash, pack
from support.bundles import LAYERS, Built
from trainer_server.config import Aggregation, Head, Rule, RunConfig
from trainer_server.coordinator.advance import advance
from trainer_server.coordinator.events import (
    ClockTicked,
    Command,
    Event,
    SendAck,
    StatusSeen,
    Stop,
    UpdateSeen,
)
from trainer_server.coordinator.state import Plan, State, initial_state

ROUND_SECONDS, JOIN_SECONDS = 100.0, 50.0
PRIVACY = Privacy(clip=1.0, noise_multiplier=1.0, shares=1)
RULE = Sal(CapabilityQueue(2, 0.02), max_level=LAYERS)
MEAN = Aggregation(rule=Rule.MEAN)
Tensors = dict[str, NDArray[Any]]
TENSORS: dict[str, Tensors] = {}  # of updates, by SHA-256


def plan_for(bundle_owner: Built, devices: int = 3, **config: Any) -> Plan:
    settings_: dict[str, Any] = {
        "run": "r",
        "devices": devices,
        "join_timeout": JOIN_SECONDS,
        "round_timeout": ROUND_SECONDS,
        "stage1_rounds": 4,
        "stage2_rounds": 2,
        "stage1_sal": RULE,
        "stage2_sal": RULE,
        "head": Head.CLASS_MEANS,
        "head_sums": Sums.FEATURES,
        "secure_sums": False,
        **config,
    }
    return Plan(RunConfig(**settings_), bundle_owner.bundle, session="s", read=TENSORS.__getitem__)


def make_update(
    plan: Plan, announced: Round, device: str, accuracy: float = 0.5, nll: float = 1.0, **change: Any
) -> UpdateSeen:
    """A valid update of `device`. Its values depend on device and round; `change` replaces fields."""
    bundle, rng = plan.bundle, np.random.default_rng([abs(announced.round), *device.encode()])

    def drawn(*shape: int) -> NDArray[np.float32]:
        return rng.normal(size=shape).astype(np.float32)

    samples = int(rng.integers(40, 90))

    dims, classes, tensors = bundle.manifest.dims, len(bundle.classes), Tensors()
    if announced.stage is Stage.STATISTICS:
        counts = rng.integers(1, 9, classes).astype(np.float32)
        sums = drawn(classes, dims.feature)
        norm_sum = np.array([np.linalg.norm(sums, axis=1).sum() * 1.5], np.float32)
        tensors = {"class_sums": sums, "class_counts": counts, "norm_sum": norm_sum}
    elif announced.stage is Stage.HEAD:
        width = classes if announced.sums is Sums.LOGITS else dims.feature
        tensors = head_statistics(drawn(samples, width), rng.integers(0, classes, samples), classes)
    elif announced.stage is Stage.GLOBAL:
        tensors = bundle.expert.split(drawn(bundle.expert.size(announced.level)))
    elif announced.stage is Stage.PERSONAL:
        tensors = bundle.gate.split(drawn(bundle.gate.total))
    fields: dict[str, Any] = {
        "run": announced.run,
        "session": announced.session,
        "round": announced.round,
        "device": device,
        "stage": announced.stage,
        "level": announced.level,
        "samples": samples,
        "metrics": {"held_out_global": accuracy, "global_nll": nll},
    }
    tensors = change.pop("tensors", tensors)
    update = Update(**{**fields, **change})
    sha256 = blob_hash(pack(update, tensors))
    TENSORS[sha256] = tensors
    return UpdateSeen(update, tensors, sha256, size=10)


def head_statistics(features: NDArray[np.float32], labels: NDArray[np.int64], classes: int) -> Tensors:
    """What a device with these features or logits (n, D) and labels (n,) sends in the head round."""
    sums = class_sums(features, labels, classes)
    return {**{name: sums[name] for name in ("class_sums", "class_counts")}, "second_moments": second_moments(features)}


def unchanged(state: State, before: State) -> bool:
    """Whether all parts but the counts of refusals are the same objects, or equal. `==` of dataclasses compares arrays
    element by element, from Python 3.13 on also those that are the same object."""
    names = [each.name for each in fields(State) if each.name != "refused"]
    pairs = [(getattr(state, name), getattr(before, name)) for name in names]
    return all(new is old or new == old for new, old in pairs)


@dataclass
class CoordinatorRun:
    """A run without I/O. Collects all commands."""

    plan: Plan
    now: float = 0.0
    commands: list[Command] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.state: State = initial_state(self.plan, self.now)

    def feed(self, *events: Event) -> list[Command]:
        """Commands of these events and of a clock tick after them."""
        return self.feed_only(*events, ClockTicked())

    def feed_only(self, *events: Event) -> list[Command]:
        fresh: list[Command] = []
        for event in events:
            self.state, commands = advance(self.plan, self.state, event, self.now)
            fresh += commands
        self.commands += fresh
        return fresh

    def online(self, *devices: str, online: bool = True) -> list[Command]:
        return self.feed(*(StatusSeen(self.status(name, online=online)) for name in devices))

    def status(self, device: str, **change: Any) -> DeviceStatus:
        return DeviceStatus(**{"device": device, "online": True, "bundle": self.plan.bundle.sha256, **change})

    def answers(self, devices: Iterable[str], **change: Any) -> list[Command]:
        announced = self.announced
        return self.feed(*(make_update(self.plan, announced, device, **change) for device in devices))

    def until_stop(self, devices: list[str], accuracy: Callable[[Round], float] = lambda _: 0.5) -> Stop:
        while not self.of(Stop):
            self.answers(devices, accuracy=accuracy(self.announced))
        stop: Stop = self.of(Stop)[0]
        return stop

    @property
    def announced(self) -> Round:
        assert self.state.announced is not None
        return self.state.announced

    def of(self, kind: type[Any]) -> list[Any]:
        return [command for command in self.commands if isinstance(command, kind)]

    @property
    def verdicts(self) -> list[Verdict]:
        return [reply.ack.verdict for reply in self.of(SendAck)]


ABC = ["a", "b", "c"]


def started(built: Built, devices: list[str] = ABC, **config: Any) -> CoordinatorRun:
    run = CoordinatorRun(plan_for(built, len(devices), **config))
    run.online(*devices)
    return run
