"""A personalized model: MoFM of global expert, local expert and gate, with its calibration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from pydantic import Field

from edge_runtime.training.adoption import ModelScore
from fedfmsl.algorithms.arrays import Floats
from fedfmsl.algorithms.calibration import calibrate
from fedfmsl.protocol.messages import Level, Name, Number, Sha256


class ModelHeader(ModelScore):
    """Origin and calibration of a personalized model. Also the metadata of the exported ONNX file.

    `bundle`, `task`, `expert` and `gate` are SHA-256 hashes. `expert` and `gate` are "" if the server has none yet.
    """

    run: Name
    round: Number
    device: Name
    level: Level
    expert: Sha256
    gate: Sha256
    temperature: float = Field(gt=0)
    threshold: float = Field(ge=0, le=1)  # a confidence below it means `unknown`
    prior: tuple[float, ...]  # class prior of the mixture
    held: tuple[bool, ...]  # classes that the device holds


@dataclass(frozen=True)
class PersonalModel:
    header: ModelHeader
    tensors: Mapping[str, Floats]

    def changed(self, **header: object) -> PersonalModel:
        """With other values in the header."""
        return replace(self, header=self.header.model_copy(update=header))

    @property
    def inputs(self) -> dict[str, Floats]:
        """All inputs of the bundle's template except the samples."""
        return {**self.tensors, "temperature": np.array([self.header.temperature], np.float32)}

    def calibrated(self, log_p: Floats) -> Floats:
        """Calibrated class log-probabilities (n, C) of the mixture's."""
        return calibrate(log_p, self.header.temperature)
