"""FedFMSL as a method: the run of `simulation.federation`, with a share of the rounds in stage 2."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from edge_runtime.training.context import Samples, TrainingContext
from edge_runtime.training.evaluation import predict_models
from edge_runtime.training.local_expert import train_personal
from edge_runtime.training.stages import Globals
from fedfmsl.algorithms.arrays import Floats
from fedfmsl.algorithms.sal import CapabilityQueue
from fedfmsl.protocol.messages import Round, Stage, Sums
from simulation.federation import Federation, Tamper, honest
from simulation.fleet import Fleet
from simulation.methods.base import Method, MethodSettings, RoundCost, stage_rounds
from trainer_server.config import Aggregation, Head, Rule, RunConfig, Trigger, sal_rules

AS_IN_THE_PAPER = Aggregation(rule=Rule.MEAN, norm_factor=None, weight_cap=None)
ROWS = {"start": "start", "global": "global", "local_expert": "local-expert"}  # beside the mixture


@dataclass(frozen=True)
class Stage2:
    """What the local expert of a device is trained and read with. `of`: the rounds of stage 2."""

    round: Round
    published: Globals
    of: int


class SimulatedRun(Federation):
    """A run, and the settings of the comparison."""

    def __init__(self, settings: MethodSettings, config: RunConfig, fleet: Fleet, tamper: Tamper) -> None:
        super().__init__(config, fleet, tamper)
        self.settings = settings


@dataclass(frozen=True)
class FedFMSL(Method[SimulatedRun, Stage2]):
    """Both stages, with the server's defaults, except that updates are averaged as in the paper: a mean weighted by
    samples, without the bounds on norms and weights that protect a fleet, and no global expert is rejected.

    `sal`: when more blocks are activated. `head`: what stage 1 starts from. `sums`: what the head after stage 1 is
    computed from. `min_class_count`: samples from which a device's class enters them. `secure_sums`: whether they are
    rounded as for secure aggregation, and need three devices. `tamper`: changes the results of devices; for an
    ablation.
    """

    sal: Trigger = Trigger.CAPABILITY_QUEUE
    head: Head = Head.ZEROS
    sums: Sums = Sums.LOGITS
    min_class_count: int = RunConfig.model_fields["min_class_count"].default
    secure_sums: bool = RunConfig.model_fields["secure_sums"].default
    tamper: Tamper = honest
    name: str = "fedfmsl"
    title: str = "FedFMSL (MoFM)"
    source: str = "Wu et al., FedFMSL, IEEE TMC 23(12), 2024"

    @property
    def follows_level_caps(self) -> bool:
        return True

    @property
    def adapting(self) -> Collection[str]:
        return (self.name,)

    def start(self, fleet: Fleet, settings: MethodSettings) -> tuple[SimulatedRun, RoundCost]:
        stage1_rounds, stage2_rounds = stage_rounds(settings.rounds)
        stage1_sal, stage2_sal = sal_rules(self.sal, CapabilityQueue().min_gain, settings.level)
        config = RunConfig.model_validate(
            {
                "run": "simulation",
                "devices": len(fleet.names),
                "min_updates": 1,  # any participation is a round, as with the other methods
                "stage1_rounds": stage1_rounds,
                "stage2_rounds": stage2_rounds,
                "stage1": settings.training.model_copy(update={"seed": settings.seed}),
                "stage2": settings.stage2.model_copy(update={"seed": settings.seed}),
                "head": self.head,
                "head_sums": self.sums,
                "min_class_count": self.min_class_count,
                "secure_sums": self.secure_sums,
                "stage1_sal": stage1_sal,
                "stage2_sal": stage2_sal,
                "aggregation": AS_IN_THE_PAPER,
                "max_regressed": 1.0,
                "seed": settings.seed,
            }
        )
        run = SimulatedRun(settings, config, fleet, self.tamper)
        devices, cost = settings.all_devices(fleet, 0), RoundCost()
        while run.announced.stage in (Stage.HOLDERS, Stage.STATISTICS):
            cost += _cost(run.step(devices), bytes_down=0)
        return run, cost

    def round(
        self, fleet: Fleet, state: SimulatedRun, devices: Sequence[str], index: int
    ) -> tuple[SimulatedRun, RoundCost]:
        """The head round belongs to the last round of stage 1. It asks all devices, as the server does."""
        bytes_down = state.bytes_down
        cost = _cost(state.step(devices), bytes_down)
        while state.announced.stage in (Stage.HOLDERS, Stage.HEAD):
            bytes_down = state.bytes_down
            cost += _cost(state.step(state.settings.all_devices(fleet, index)), bytes_down)
        return state, cost

    def adapt(self, fleet: Fleet, state: SimulatedRun, devices: Sequence[str]) -> SimulatedRun:
        fleet.map(_train_alone, dict.fromkeys(devices, self._stage2(state)))
        return state

    def model(self, state: SimulatedRun, device: str) -> Stage2:
        return self._stage2(state)

    def _stage2(self, state: SimulatedRun) -> Stage2:
        config, announced = state.config, state.announced
        sal = replace(config.stage2_sal, max_level=announced.level)
        changes = {"stage": Stage.PERSONAL, "training": config.stage2, "sal": sal}
        return Stage2(announced.model_copy(update=changes), state.received, config.stage2_rounds)

    def log_p(self, context: TrainingContext, model: Stage2, samples: Samples) -> dict[str, Floats]:
        models = predict_models(context, model.round, model.published, samples)
        return {self.name: models["mofm"], **{row: models[name] for name, row in ROWS.items()}}


def _train_alone(context: TrainingContext, model: Stage2) -> None:
    """Stage 2 of a device outside of the federation. Its gate adapter stays that of the federation."""
    for index in range(model.of):
        train_personal(context, model.round.model_copy(update={"index": index, "of": model.of}), model.published)


def _cost(bytes_up: Mapping[str, int], bytes_down: int) -> RoundCost:
    return RoundCost(bytes_up=bytes_up, bytes_down=dict.fromkeys(bytes_up, bytes_down))
