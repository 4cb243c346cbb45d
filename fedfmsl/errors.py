"""All errors that a user can cause, as one tree. A process that ends with one uses its exit code.

FedFMSLError              1   the user can fix it; the text is one line: what, where, what to do
├── ConfigError           2   an option or a setting has an invalid value
├── InputError            3   images, texts, folders or class names cannot be used
├── BundleError           4   a bundle is missing, altered, or of another model
├── WeightsError          5   model weights cannot be found, downloaded or recognized
├── BrokerError           6   the MQTT broker cannot be reached or refuses the connection
├── MessageError          7   a message is not valid (never fatal to its receiver)
└── RunError              8   a run cannot continue: too few devices, a process that ended early
"""

from __future__ import annotations

LINE = 300  # longest text from outside, in characters


def one_line(text: object) -> str:
    """Untrusted text as one short line of printable characters, for errors and logs."""
    line = " ".join(str(text)[: 10 * LINE].split())
    return "".join(c if c.isprintable() else "?" for c in line)[:LINE]


class FedFMSLError(Exception):
    exit_code = 1

    @property
    def lines(self) -> tuple[str, ...]:
        """One line for each problem."""
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
