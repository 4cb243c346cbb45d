"""Personalized models of the tiny backbones, with the rounds and globals that they come from."""

from __future__ import annotations

from dataclasses import replace

from edge_runtime.store import DeviceStore
from edge_runtime.training.personal_model import PersonalModel
from edge_runtime.training.stages import Globals
from fedfmsl.algorithms.sal import CapabilityQueue, Sal
from fedfmsl.common.files import write_atomically
from fedfmsl.protocol.messages import Round, Stage, Training
from fedfmsl.protocol.task_bundle import TaskBundle
from fedfmsl.protocol.tensors import pack
from support.bundles import Built, random_theta

SHA = "ab" * 32


def round_of(stage: Stage, index: int = 0) -> Round:
    named = {} if stage is Stage.STATISTICS else {"expert": SHA, "start": SHA, "gate": SHA}
    return Round(
        run="r",
        session="s",
        round=3 + index,
        stage=stage,
        index=index,
        of=3,
        level=2,
        training=Training(epochs=1, batch_size=8, learning_rate=0.01),
        sal=Sal(CapabilityQueue(2, 1.0), max_level=2),
        **named,
    )


def globals_of(built: Built, level: int = 2) -> Globals:
    """Globals after stage 1, with the initial gate."""
    return Globals(random_theta(built.bundle, level, 1), random_theta(built.bundle, 1, 2), built.bundle.initial()[1])


def another_model(bundle: TaskBundle, before: PersonalModel, round_: int, level: int) -> PersonalModel:
    theta = {name: random_theta(bundle, level, seed) for seed, name in enumerate(("global_theta", "local_theta"))}
    header = before.header.model_copy(update={"round": round_, "level": level})
    return replace(before, header=header, tensors={**before.tensors, **theta})


def keep(store: DeviceStore, model: PersonalModel) -> None:
    """Stores the model as a daemon does after a round."""
    write_atomically(store.mixture, pack(model.header, model.tensors), durable=True)
