"""What the exit code of a command means."""

from __future__ import annotations

import os
import signal

from fedfmsl import errors

DISK = os.EX_IOERR
INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM

EXIT_CODES = {
    0: "success",
    errors.FedFMSLError.exit_code: "an unexpected error; its traceback is on stderr",
    errors.ConfigError.exit_code: "an option or setting has an invalid value",
    errors.InputError.exit_code: "images, texts, folders or class names cannot be used",
    errors.BundleError.exit_code: "a bundle is missing, changed, or of another model",
    errors.WeightsError.exit_code: "model weights cannot be found, downloaded or recognized",
    errors.BrokerError.exit_code: "the MQTT broker is unreachable or refuses the client",
    errors.MessageError.exit_code: "a message does not match the protocol; no command ends with this code",
    errors.RunError.exit_code: "a run cannot continue: too few devices, a process that ended early, or a port in use",
    DISK: "the disk is full, or fails",
    INTERRUPTED: "interrupted with Ctrl-C (SIGINT)",
    TERMINATED: "terminated (SIGTERM)",
}
