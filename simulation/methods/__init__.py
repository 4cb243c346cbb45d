"""Federated methods on one interface, so that they can be compared (see `simulation.methods.base`)."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from fedfmsl.errors import ConfigError
from simulation.methods.base import Method

METHODS = {
    "fedfmsl": "fedfmsl:FedFMSL",
}


def method_of(name: str) -> Method[Any, Any]:
    """The method `name`, imported when it is first used. Raises ConfigError if there is none."""
    if name not in METHODS:
        raise ConfigError(f"there is no method {name!r}; choose from {', '.join(METHODS)}")
    module, kind = METHODS[name].split(":")
    method: Method[Any, Any] = getattr(import_module(f"simulation.methods.{module}"), kind)()
    return method
