"""The folder of the global expert: a PEFT adapter with its model card, as the Hugging Face hub and PEFT read it."""

from __future__ import annotations

from fedfmsl.algorithms.arrays import Vector
from fedfmsl.protocol.task_bundle import TaskBundle
from trainer_server.config import RunConfig
from trainer_server.storage.model_card import Result, model_card, result_of
from trainer_server.storage.peft_adapter import adapter_files
from trainer_server.storage.run_store import RunStore

CARD = "README.md"


def expert_files(
    bundle: TaskBundle, config: RunConfig, expert: Vector, level: int, result: Result | None
) -> dict[str, bytes]:
    """Content by name, for `write_folder`. `expert` (P,), at `level`. `result`: the latest one."""
    return {**adapter_files(bundle, expert, level), CARD: model_card(bundle, config, level, result).encode()}


def last_result(store: RunStore) -> Result | None:
    """The latest accuracy of the global expert that a closed round has."""
    for summary, _ in reversed(store.rounds.summaries()):
        if {"global", "held_out_global"} & set(summary.means):
            record = store.rounds.one(summary.round)
            if record is not None and (result := result_of(record)):
                return result
    return None
