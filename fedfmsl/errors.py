"""Every error a user can cause, as one tree. Each carries the exit code its process ends with.

FedFMSLError              1   something a user can mend; its text is one line: what, where, what to do
├── ConfigError           2   an option or a setting has an unusable value
├── InputError            3   images, texts, folders or class names cannot be used
├── BundleError           4   a bundle is missing, altered, or of another model
├── WeightsError          5   model weights cannot be found, fetched or recognised
├── BrokerError           6   the MQTT broker cannot be reached or refuses us
├── MessageError          7   a message does not fit the contract (never fatal to its receiver)
└── RunError              8   a run cannot go on: too few devices, a process that ended early
"""

from __future__ import annotations

LINE = 300  # characters of a text that comes from elsewhere


def one_line(text: object) -> str:
    """A text that may hold what a stranger wrote, as it may stand in an error's: one short line, only of printable
    characters."""
    line = " ".join(str(text)[: 10 * LINE].split())
    return "".join(c if c.isprintable() else "?" for c in line)[:LINE]


class FedFMSLError(Exception):
    """`lines`: what is said of it, one line for each thing that is wrong."""

    exit_code = 1

    @property
    def lines(self) -> tuple[str, ...]:
        return (" ".join(str(self).split()),)


class ConfigError(FedFMSLError):
    exit_code = 2


class InputError(FedFMSLError):
    exit_code = 3


class BundleError(FedFMSLError):
    exit_code = 4


class WeightsError(FedFMSLError):
    exit_code = 5


class BrokerError(FedFMSLError):
    exit_code = 6


class MessageError(FedFMSLError):
    exit_code = 7


class RunError(FedFMSLError):
    exit_code = 8
