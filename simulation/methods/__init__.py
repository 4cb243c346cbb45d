"""Federated methods on one interface, so that they can be compared (see `simulation.methods.base`).

    method = method_of("fedprox")

All start from the same head and initial LoRA, and have the same bundle, active blocks, optimizer and number of local
steps. The softmax of training is over all classes or over the held ones: see `local_training.cross_entropy`. The
docstring of each module names its source and every departure from it.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from fedfmsl.errors import ConfigError
from simulation.methods.base import Method

METHODS = {  # by name: the module, and what makes the method
    "fedfmsl": "fedfmsl:FedFMSL",
    "local-only": "local_only:LocalOnly",
    "fedit": "fedit:FedIT",
    "fedprox": "fedprox:FedProx",
    "ffa-lora": "ffa_lora:FFALoRA",
    "fedsa-lora": "fedsa_lora:FedSALoRA",
    "fine-tuning": "fine_tuning:FineTuning",
    "ditto": "ditto:Ditto",
    "fedrep": "fedrep:FedRep",
    "feddpa": "feddpa:FedDPA",
    "fedalt": "fedalt:FedALT",
    "centralised": "centralised:Centralised",
    "fedfmsl-all-at-once": "ablations:without_sal",
    "fedfmsl-fixed-schedule": "ablations:with_fixed_schedule",
    "fedfmsl-no-gate": "ablations:without_gate",
    "fedfmsl-untrained-gate": "ablations:with_untrained_gate",
    "fedfmsl-feature-sums": "ablations:with_feature_sums",
    "fedfmsl-no-sums": "ablations:without_head_round",
    "fedit-head": "ablations:FedITWithHead",
}


def method_of(name: str) -> Method[Any, Any]:
    """The method `name`, imported when it is first used. Raises ConfigError if there is none."""
    if name not in METHODS:
        raise ConfigError(f"there is no method {name!r}; choose from {', '.join(METHODS)}")
    module, maker = METHODS[name].split(":")
    method: Method[Any, Any] = getattr(import_module(f"simulation.methods.{module}"), maker)()
    return method
