"""Types of settings that several programs have. Importing them is quick: `--help` needs them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from fedfmsl.errors import ConfigError
from fedfmsl.protocol.class_names import split_names

Precision = Literal["fp32", "int8"]  # of the frozen weight matrices
EngineChoice = Literal["auto", "step-graph", "ort-training"]


def _split(value: Any) -> Any:
    if value == "":
        raise ValueError("is empty; name the classes, like apple,pear, or leave it out")
    try:
        return split_names(value) if isinstance(value, str) else value
    except ConfigError as error:  # pydantic collects only ValueErrors
        raise ValueError(str(error)) from error


ClassList = Annotated[tuple[str, ...], BeforeValidator(_split)]
