"""`edge_runtime enroll`: makes this device's key, and asks for its certificate. The key never leaves the device.

    NAME.key     fingerprint of the CA and private key, until the answer is there
    NAME.toml    the device's file: its settings, key, certificate, and the CA's certificate

Their owner alone may read them. A key that is there is used again, so that an interrupted call can be repeated: the
authority answers the same request in the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fedfmsl.common.files import why_no_file, write_atomically
from fedfmsl.common.settings import parse_toml
from fedfmsl.errors import ConfigError
from fedfmsl.transport.authority_client import MAX_ANSWER_BYTES, fetch_authority, request_certificate
from fedfmsl.transport.enrollment import (
    Token,
    check_answer,
    fingerprint,
    first_request,
    name_in,
    new_key,
    renewal_request,
    require_key,
)
from fedfmsl.transport.identity import pem_blocks, read_identity
from fedfmsl.transport.listening import parse_listen

SETTINGS = {"identity", "run", "broker", "topic_prefix", "authority"}  # that an answer may set
_CERTIFICATE = "-----BEGIN CERTIFICATE-----"


@dataclass(frozen=True)
class Applicant:
    """Who asks for a certificate. `fingerprint`: of the CA. `request`: makes the request of a new key (both PEM)."""

    name: str
    fingerprint: str
    request: Callable[[str], str]

    @classmethod
    def with_token(cls, text: str) -> Applicant:
        """Raises ConfigError if it is no token."""
        token = Token.parse(text)
        return cls(token.name, token.fingerprint, lambda key: first_request(key, token))

    @classmethod
    def with_identity(cls, path: Path) -> Applicant:
        """A device that has a certificate already. Raises ConfigError if `path` is no device's file."""
        identity = read_identity(path)
        if identity.name is None or not identity.authorities:
            raise ConfigError(f"{path} has no key and certificate of a device; pass the device's file")
        name = identity.name
        blocks = pem_blocks(path.read_text("utf-8", errors="replace"))
        present = next(block for kind, block in blocks if kind.endswith("PRIVATE KEY"))
        _, authority = pem_blocks(identity.authorities)[0]
        return cls(name, fingerprint(authority), lambda key: renewal_request(key, name, present))


def ask_authority(applicant: Applicant, address: str, folder: Path) -> Path:
    """Asks HOST:PORT `address`. Returns the device's file. Raises ConfigError if the request is refused or the device
    has its file already, RunError if there is no answer."""
    parse_listen(address)
    key = _key(applicant, folder)
    authority = fetch_authority(address, applicant.fingerprint)
    return _complete(request_certificate(address, applicant.request(key), authority), folder)


def write_request(applicant: Applicant, out: Path, folder: Path) -> str:
    """Writes the request to a file. Returns what to do next. Raises ConfigError."""
    write_atomically(out, applicant.request(_key(applicant, folder)).encode(), durable=True)
    return (
        f"wrote {out}; on the machine with the CA: python -m devices.provision sign {out.name}; then copy its answer "
        f"here, and run: python -m edge_runtime enroll --install {out.with_suffix('.toml').name}"
    )


def install_answer(answer: Path, folder: Path) -> Path:
    """Completes the device's file with an answer of `devices.provision sign`. Raises ConfigError."""
    if reason := why_no_file(answer):
        raise ConfigError(f"{answer} {reason}; pass the file that python -m devices.provision sign wrote")
    if answer.stat().st_size > MAX_ANSWER_BYTES:
        raise ConfigError(f"{answer} is too long; pass the file that python -m devices.provision sign wrote")
    return _complete(answer.read_text("utf-8", errors="replace"), folder)


def _complete(answer: str, folder: Path) -> Path:
    """Writes the answer with this device's key. Raises ConfigError if it is not for this device."""
    blocks = pem_blocks(answer)
    if [kind for kind, _ in blocks] != ["CERTIFICATE"] * 2:
        raise ConfigError("the answer has not the two certificates of a device and its CA; copy it again")
    own, authority = (block for _, block in blocks)
    name = name_in(own)
    path, key_file = folder / f"{name}.toml", folder / f"{name}.key"
    if reason := why_no_file(key_file):
        raise ConfigError(f"{key_file} {reason}; pass the --folder in which {name} has made its request")
    expected, _, key = key_file.read_text("utf-8", errors="replace").partition("\n")
    if fingerprint(authority) != expected:
        raise ConfigError(f"the answer for {name} is of another CA than its request; copy the right one")
    check_answer(key, own, authority)
    if others := sorted(parse_toml(answer, "the answer").keys() - SETTINGS):  # nobody has signed the settings
        raise ConfigError(f"the answer sets {', '.join(others)}, which no authority does; check where it is from")
    text = answer.replace(_CERTIFICATE, key + _CERTIFICATE, 1)
    write_atomically(path, text.encode(), durable=True, private=True)
    read_identity(path)
    key_file.unlink()
    return path


def _key(applicant: Applicant, folder: Path) -> str:
    """This device's private key in PEM; makes it if there is none. Raises ConfigError if the device has its file."""
    path, key_file = folder / f"{applicant.name}.toml", folder / f"{applicant.name}.key"
    if path.exists():
        raise ConfigError(f"{path} already exists and is not overwritten; remove it, or choose another --folder")
    if key_file.exists():
        expected, _, key = key_file.read_text("utf-8", errors="replace").partition("\n")
        if expected == applicant.fingerprint:
            require_key(key, key_file)
            return key
        raise ConfigError(f"{key_file} is a key for another CA; remove it, or choose another --folder")
    if not folder.is_dir():
        raise ConfigError(f"--folder {folder} does not exist; create it first")
    key = new_key()
    write_atomically(key_file, f"{applicant.fingerprint}\n{key}".encode(), durable=True, private=True)
    return key
