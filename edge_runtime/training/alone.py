"""Personalization after the end of a run in which the device took no part: stage 2 on this device alone (ours).

The device trains its local expert from the published global expert and gate adapter, as the run's devices did, with the
run's settings. The gate adapter stays as it is, because it fits all of them. Nothing is sent.
"""

from __future__ import annotations

from collections.abc import Callable

from edge_runtime.training.context import TrainingContext
from edge_runtime.training.evaluation import evaluate
from edge_runtime.training.local_expert import LocalExpert, train_local
from edge_runtime.training.mixture import global_temperature
from edge_runtime.training.stages import Globals, StageResult
from fedfmsl.protocol.messages import Round, Stage


def personalize_alone(
    context: TrainingContext, finished: Round, published: Globals, training: Callable[[Round], TrainingContext]
) -> StageResult:
    """All rounds of stage 2, then the evaluation. After an interruption it goes on with the round that was not
    completed. `training`: what a round trains with."""
    temperature = global_temperature(context, published)
    before = LocalExpert.load(context, finished.session)
    for index in range(before.round + 1 if before else 0, finished.repetitions):
        changed = {"stage": Stage.PERSONAL, "index": index, "of": finished.repetitions}
        round_ = finished.model_copy(update=changed)
        train_local(training(round_), round_, published, temperature)
    return evaluate(context, finished, published)
