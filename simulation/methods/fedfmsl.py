"""FedFMSL as a method: the run of `simulation.federation`, with a share of the rounds in stage 2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from edge_runtime.training.context import Samples, TrainingContext
from edge_runtime.training.evaluation import predict_models
from edge_runtime.training.local_expert import train_personal
from edge_runtime.training.stages import Globals
from fedfmsl.algorithms.arrays import Floats
from fedfmsl.algorithms.sal import CapabilityQueue
from fedfmsl.protocol.chunks import chunks
from fedfmsl.protocol.messages import Round, Stage
from simulation.federation import Federation, Sent
from simulation.fleet import Fleet
from simulation.methods.base import MethodSettings, RoundCost
from trainer_server.config import STAGE2, RunConfig, Trigger, sal_rules

STAGE2_SHARE = 5 / 17  # of the rounds, as the server's defaults
ROWS = {"start": "class-means", "global": "global", "local_expert": "local-expert"}  # beside the mixture


@dataclass(frozen=True)
class Stage2:
    """What the local expert of a device is trained and read with. `of`: the rounds of stage 2."""

    round: Round
    published: Globals
    of: int


@dataclass(frozen=True)
class FedFMSL:
    """Both stages, with the server's defaults. `sal`: when more blocks are activated."""

    sal: Trigger = Trigger.CAPABILITY_QUEUE
    name: str = "fedfmsl"
    title: str = "FedFMSL (MoFM)"
    source: str = "Wu et al., FedFMSL, IEEE TMC 23(12), 2024"

    def start(self, fleet: Fleet, settings: MethodSettings) -> tuple[Federation, RoundCost]:
        stage1_rounds, stage2_rounds = stage_rounds(settings.rounds)
        stage1_sal, stage2_sal = sal_rules(self.sal, CapabilityQueue().min_gain, settings.level)
        training = settings.training
        config = RunConfig.model_validate(
            {
                "run": "simulation",
                "devices": len(fleet.names),
                "stage1_rounds": stage1_rounds,
                "stage2_rounds": stage2_rounds,
                "stage1": training.model_copy(update={"seed": settings.seed}),
                "stage2": STAGE2.model_copy(update={"seed": settings.seed, "batch_size": training.batch_size}),
                "stage1_sal": stage1_sal,
                "stage2_sal": stage2_sal,
                "seed": settings.seed,
            }
        )
        run = Federation(config, fleet)
        return run, _cost(run.step(), bytes_down=0)

    def round(
        self, fleet: Fleet, state: Federation, devices: Sequence[str], index: int
    ) -> tuple[Federation, RoundCost]:
        bytes_down = state.bytes_down
        return state, _cost(state.step(devices), bytes_down)

    def adapt(self, fleet: Fleet, state: Federation, devices: Sequence[str]) -> Federation:
        fleet.map(_train_alone, {name: self.model(state, name) for name in devices})
        return state

    def model(self, state: Federation, device: str) -> Stage2:
        config, announced = state.config, state.announced
        sal = replace(config.stage2_sal, max_level=announced.level)
        changes = {"stage": Stage.PERSONAL, "training": config.stage2, "sal": sal}
        return Stage2(announced.model_copy(update=changes), state.received, config.stage2_rounds)

    def log_p(self, context: TrainingContext, model: Stage2, samples: Samples) -> dict[str, Floats]:
        models = predict_models(context, model.round, model.published, samples)
        return {self.name: models["mofm"], **{row: models[name] for name, row in ROWS.items()}}


def stage_rounds(rounds: int) -> tuple[int, int]:
    """The rounds of stages 1 and 2, at least one each."""
    stage2 = max(1, round(STAGE2_SHARE * rounds))
    return max(1, rounds - stage2), stage2


def _train_alone(context: TrainingContext, model: Stage2) -> None:
    """Stage 2 of a device outside of the federation. Its gate adapter stays that of the federation."""
    for index in range(model.of):
        train_personal(context, model.round.model_copy(update={"index": index, "of": model.of}), model.published)


def _cost(updates: Mapping[str, Sent], bytes_down: int) -> RoundCost:
    up = {name: sum(map(len, chunks(sent.blob))) for name, sent in updates.items()}
    return RoundCost(bytes_up=up, bytes_down=dict.fromkeys(updates, bytes_down))
