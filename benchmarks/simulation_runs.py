"""The measured runs of `benchmarks.simulation`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from benchmarks.process_tree import Mark, Usage


@dataclass(frozen=True)
class Run:
    """A measured run. `accuracy` on the test split, by the number of rounds before."""

    usage: Usage
    accuracy: Mapping[int, float]

    @property
    def rounds(self) -> int:
        return len(self._marks) - 1

    @property
    def start(self) -> Mark:
        """What is used before the first round."""
        return self._marks[0]

    @property
    def per_round(self) -> Mark:
        """Means over all rounds but the first, in which models are loaded."""
        first, last = self._marks[1], self._marks[-1]
        count = self.rounds - 1
        return Mark(
            "round",
            (last.training - first.training) / count,
            (last.processor - first.processor) / count,
            (last.wall - first.wall) / count,
        )

    def after(self, index: int) -> Mark:
        """What the first `index` rounds use, with all that comes before them."""
        return self._marks[index]

    def processor_after(self, index: int) -> float:
        """The processor seconds of `index` rounds, measured or computed from `per_round`."""
        return self._marks[1].processor + (index - 1) * self.per_round.processor

    def reaches(self, accuracy: float) -> int:
        """The first round after which the accuracy is reached."""
        return min(index for index, value in self.accuracy.items() if value >= accuracy)

    @property
    def _marks(self) -> list[Mark]:
        return [mark for mark in self.usage.marks if mark.name.startswith("round")]

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Run:
        value = json.loads(data)
        marks = [Mark(**mark) for mark in value["usage"].pop("marks")]
        accuracy = {int(index): each for index, each in value["accuracy"].items()}
        return cls(Usage(marks=marks, **value["usage"]), accuracy)


@dataclass(frozen=True)
class Runs:
    """`ours`: the first run, then runs of other seeds with the same features. `int8`: a first run with int8 weights.

    The others are of Flower. `tried`: a run of each setting, of which `best` needs the fewest processor seconds.
    `cached`: with the states of the frozen blocks stored. `whole`: with LoRA in all blocks.
    """

    ours: Sequence[Run]
    int8: Run
    tried: Mapping[str, Run]
    best: str
    flower: Run
    cached: Run
    whole: Run

    @property
    def common(self) -> float:
        """The highest accuracy that all runs of the same job reach within the rounds of Flower."""
        same = (self.ours[0], self.int8, self.flower, self.cached)
        return min(max(run.accuracy[index] for index in self.flower.accuracy) for run in same)
