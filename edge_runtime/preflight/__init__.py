"""`edge_runtime check`: everything that a run needs, checked before it starts. Writes nothing (ours)."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edge_runtime.preflight.context import Check, Context, Finding
from edge_runtime.preflight.machine import check_clock, check_governor, check_page, check_state, check_watch
from edge_runtime.preflight.network import check_broker, check_identity
from edge_runtime.preflight.training import check_bundle, check_memory, check_samples
from edge_runtime.settings import Settings
from edge_runtime.store import DeviceStore
from fedfmsl.errors import ConfigError, FedFMSLError, InputError, no_permission
from fedfmsl.transport import outage

# Later checks use what earlier ones have found.
CHECKS: dict[str, Check] = {
    "state": check_state,
    "clock": check_clock,
    "identity": check_identity,
    "broker": check_broker,
    "bundle": check_bundle,
    "samples": check_samples,
    "memory": check_memory,
    "governor": check_governor,
    "watch": check_watch,
    "page": check_page,
}


def run_preflight(settings: Settings, config: Path | None = None) -> Iterator[Finding]:
    """Yields the findings of all checks. A failed check is a finding with the error's exit code. `config`: the file
    of the settings."""
    with contextlib.suppress(ConfigError):  # the check of the identity says why it cannot be used
        newest = DeviceStore(settings.state).renewed.newest(settings.identity)
        settings = settings.model_copy(update={"identity": newest})
    with _scratch() as scratch, _without_logs_of_outages():
        context = Context(Path(scratch), config)
        for name, check in CHECKS.items():
            try:
                yield from check(settings, context)
            except FedFMSLError as error:
                yield Finding(name, str(error), error.exit_code)
            except PermissionError as error:
                yield Finding(name, no_permission(error.filename, "use"), InputError.exit_code)


@contextmanager
def _without_logs_of_outages() -> Iterator[None]:
    """Some brokers end the connection at a message that the checks try, which is a finding of its own."""
    outages = logging.getLogger(outage.__name__)
    before, outages.disabled = outages.disabled, True
    try:
        yield
    finally:
        outages.disabled = before


def _scratch() -> tempfile.TemporaryDirectory[str]:
    """Raises ConfigError."""
    try:
        return tempfile.TemporaryDirectory()
    except OSError as error:
        raise ConfigError(
            f"the check needs a temporary folder ({error.strerror}); set TMPDIR to a folder that this user can write to"
        ) from error
