"""Secure sums on the wire (see `fedfmsl.algorithms.secure_aggregation`): tensors of updates and globals.

    round     update of a device                           globals
    keys      its `SignedKeys`
    shares    SHARES (H, SHARE_BYTES)                      the roster
    holders   `encoding.SUMS` (C,), masked                 the roster
    unmask    OPENED (M, 16)                               the roster, SHARES (n, H, SHARE_BYTES)
    statistics or head, and unmask again                   as above

H holders of a device's seeds, M members whose seeds it holds. Index i of the stages `keys` and `holders` is the i-th
execution of the protocol; its rounds `unmask` have the indices 2i and 2i + 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedfmsl.algorithms.arrays import Tensors
from fedfmsl.algorithms.secure_aggregation import (
    KEY_BYTES,
    VECTORS,
    Bytes,
    Roster,
    SecureAggregationError,
)
from fedfmsl.errors import MessageError
from fedfmsl.protocol.messages import Round, Stage

SHARES, OPENED = "shares", "opened"
MAX_PROOF_BYTES = 8192  # of a certificate or a signature
_KEYS, _PROOFS, _NAMES = "keys", ("certificate", "signature"), "name"


def context(run: str, session: str, keys_round: int) -> bytes:
    """What distinguishes an execution of the protocol from all others."""
    return f"{run} {session} {keys_round}".encode()


def vector_of(round_: Round) -> int:
    """Index of the vector that the round masks or unmasks: the holders are the first, the sums the second."""
    return round_.index % VECTORS if round_.stage is Stage.UNMASK else int(round_.stage is not Stage.HOLDERS)


@dataclass(frozen=True)
class SignedKeys:
    """Public keys (1 + VECTORS, 32) of a device, its certificate (DER), and the signature of `message`.

    Without a certificate, as on a broker with passwords, both are empty.
    """

    keys: Bytes
    certificate: bytes = b""
    signature: bytes = b""

    def message(self, name: str, context: bytes) -> bytes:
        """What the device `name` signs."""
        return b"\n".join((b"fedfmsl keys of secure sums", context, name.encode(), self.keys.tobytes()))

    def tensors(self) -> Tensors:
        return {_KEYS: self.keys, **{name: _bytes(value) for name, value in zip(_PROOFS, self._proofs, strict=True)}}

    @classmethod
    def read(cls, tensors: Tensors) -> SignedKeys:
        """The inverse of `tensors`. Raises MessageError."""
        if set(tensors) != {_KEYS, *_PROOFS}:
            raise MessageError(f"the tensors {sorted(tensors)[:3]} are not signed keys")
        proofs = [tensor_of(tensors, name, np.uint8, (None,)) for name in _PROOFS]
        if max(proof.size for proof in proofs) > MAX_PROOF_BYTES:
            raise MessageError(f"a certificate or signature is longer than {MAX_PROOF_BYTES} bytes")
        keys = np.asarray(tensor_of(tensors, _KEYS, np.uint8, (1 + VECTORS, KEY_BYTES)), np.uint8)
        return cls(keys, proofs[0].tobytes(), proofs[1].tobytes())

    @property
    def _proofs(self) -> tuple[bytes, bytes]:
        return self.certificate, self.signature


def roster_tensors(signed: Mapping[str, SignedKeys]) -> Tensors:
    """The keys of all devices as globals."""
    names = sorted(signed)
    ordered = [signed[name] for name in names]
    columns = {
        _NAMES: [name.encode() for name in names],
        "certificate": [each.certificate for each in ordered],
        "signature": [each.signature for each in ordered],
    }
    tensors: dict[str, NDArray[np.generic]] = {_KEYS: np.stack([each.keys for each in ordered])}
    for column, values in columns.items():
        tensors[column] = _bytes(b"".join(values))
        tensors[f"{column}_ends"] = np.cumsum([len(value) for value in values], dtype=np.uint64)
    return tensors


def read_roster(tensors: Tensors) -> dict[str, SignedKeys]:
    """The inverse of `roster_tensors`. Raises MessageError."""
    keys = tensor_of(tensors, _KEYS, np.uint8, (None, 1 + VECTORS, KEY_BYTES))
    names, certificates, signatures = (_column(tensors, column, len(keys)) for column in (_NAMES, *_PROOFS))
    try:
        decoded = [name.decode() for name in names]
    except UnicodeDecodeError as error:
        raise MessageError("the roster has a name that is not UTF-8") from error
    rows = zip(keys, certificates, signatures, strict=True)
    signed = {
        name: SignedKeys(np.asarray(row, np.uint8), certificate, signature)
        for name, (row, certificate, signature) in zip(decoded, rows, strict=True)
    }
    if len(signed) != len(decoded):
        raise MessageError("the roster has a device twice")
    return signed


def roster_of(signed: Mapping[str, SignedKeys], context: bytes) -> Roster:
    """Raises MessageError if there are too few devices."""
    names = sorted(signed)
    try:
        return Roster(names, np.stack([signed[name].keys for name in names]), context)
    except (SecureAggregationError, ValueError) as error:
        raise MessageError(str(error)) from error


def tensor_of(tensors: Tensors, name: str, dtype: type[np.generic], shape: Sequence[int | None]) -> NDArray[np.generic]:
    """A tensor of this type and shape; None is any length. Raises MessageError."""
    tensor = tensors.get(name)
    fits = tensor is not None and tensor.dtype == dtype and len(tensor.shape) == len(shape)
    if tensor is None or not fits or any(n not in (None, m) for n, m in zip(shape, tensor.shape, strict=True)):
        found = "missing" if tensor is None else f"{tensor.dtype}{list(tensor.shape)}"
        expected = [n if n is not None else "…" for n in shape]
        raise MessageError(f"tensor {name!r} is {found}, expected {np.dtype(dtype)}{expected}")
    return tensor


def _column(tensors: Tensors, column: str, count: int) -> list[bytes]:
    joined = tensor_of(tensors, column, np.uint8, (None,)).tobytes()
    ends = [int(end) for end in np.asarray(tensor_of(tensors, f"{column}_ends", np.uint64, (count,)))]
    if ends != sorted(ends) or (ends[-1] if ends else 0) != len(joined):
        raise MessageError(f"the roster's {column}s do not end where it says")
    return [joined[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _bytes(value: bytes) -> Bytes:
    return np.frombuffer(value, np.uint8)
