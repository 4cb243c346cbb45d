"""The file with the token that opens a web page."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from fedfmsl.common.files import why_no_file
from fedfmsl.errors import ConfigError

MIN_TOKEN = 16  # characters


def stored_token(path: Path) -> str:
    """The token in a file. Makes the file, for its owner only, if it does not exist. Raises ConfigError."""
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            token = secrets.token_urlsafe(24)
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(token + "\n")
            return token
        if reason := why_no_file(path):
            raise ConfigError(f"token file {path} {reason}; name a file")
        if path.stat().st_mode & 0o077:
            raise ConfigError(f"token file {path}: others may read it; chmod 600 {path}")
        token = path.read_text("utf-8", errors="replace").strip()
    except OSError as error:
        raise ConfigError(f"token file {path} cannot be used ({error.strerror}); check the path") from error
    if len(token) < MIN_TOKEN:
        raise ConfigError(f"token file {path} has less than {MIN_TOKEN} characters; remove it, and a new one is made")
    return token
