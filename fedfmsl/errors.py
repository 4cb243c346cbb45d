"""The errors that a user can fix. The text of each is one line: what is wrong, where, and what to do.

A process that ends with one of them has its exit code; `fedfmsl.common.exit_codes` has the meaning of each. A
MessageError never ends the process that receives the message.
"""

from __future__ import annotations

import os
from unicodedata import category

LINE = 300  # maximum length of untrusted text, in characters


def one_line(text: object) -> str:
    """Untrusted text as one short line of printable characters, for errors and logs."""
    line = " ".join(str(text)[: 10 * LINE].split())
    if line.isprintable():
        return line[:LINE]
    return "".join(c if c.isprintable() else "?" for c in line)[:LINE]


def shown(text: object) -> str:
    """A path or a name as text for messages, logs and predictions.

    Linux takes any bytes as a name. Bytes that are not UTF-8, which Python keeps as surrogates, and control characters
    are escaped; every other name stays as it is.
    """
    return "".join(_escaped(c) if category(c) in ("Cc", "Cs") else c for c in str(text))


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # how Python reads a byte that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def no_permission(path: object, do: str = "read") -> str:
    """The line for a file or folder that this process may not use."""
    return f"{path}: no permission to {do} it as user {os.geteuid()}; change its owner or its mode"


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


class ClockError(BrokerError, MessageError):
    """A certificate is not valid yet: this machine's clock is behind, as on a board without a battery for it."""
