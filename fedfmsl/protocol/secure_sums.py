"""Secure sums on the wire (see `fedfmsl.algorithms.secure_aggregation`): tensors of updates and globals.

    round     update of a device                           globals
    keys      its `SignedKeys`
    shares    SHARES (H, SHARE_BYTES)                      the roster
    holders   `encoding.SUMS` (2C,), masked                the roster
    unmask    OPENED (M, 16)                               the roster, SHARES (n, H, SHARE_BYTES)
    statistics or head, and unmask again                   as above

The updates of stages 1 and 2 take the same rounds without `holders`; their SUMS are those of
`fedfmsl.algorithms.weighted_sums`. H holders of a device's seeds, M members whose seeds it holds. Index i of the stages
`keys` and `shares` is the i-th execution of the protocol; its rounds `unmask` have the indices 2i and 2i + 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedfmsl.algorithms.arrays import Tensors
from fedfmsl.algorithms.secure_aggregation import (
    KEY_BYTES,
    MIN_DEVICES,
    VECTORS,
    Bytes,
    Roster,
    SecureAggregationError,
)
from fedfmsl.errors import MessageError
from fedfmsl.protocol.messages import Round, Stage

SHARES, OPENED = "shares", "opened"
MAX_PROOF_BYTES = 8192  # of a certificate or a signature
_KEYS, _LEVEL, _PROOFS, _NAMES = "keys", "level", ("certificate", "signature"), "name"


def context(run: str, session: str, keys_round: int) -> bytes:
    """What distinguishes an execution of the protocol from all others."""
    return f"{run} {session} {keys_round}".encode()


def vector_of(round_: Round) -> int:
    """Index of the vector that the round masks or unmasks: the holders are the first, the sums the second."""
    return round_.index % VECTORS if round_.stage is Stage.UNMASK else int(round_.stage is not Stage.HOLDERS)


@dataclass(frozen=True)
class SignedKeys:
    """Public keys (1 + VECTORS, 32) of a device, its certificate (DER), and the signature of `message`. `level`: at
    which it trains.

    Without a certificate, as on a broker with passwords, both are empty.
    """

    keys: Bytes
    level: int = 0
    certificate: bytes = b""
    signature: bytes = b""

    def message(self, name: str, context: bytes) -> bytes:
        """What the device `name` signs."""
        about = (b"fedfmsl keys of secure sums", context, name.encode(), b"%d" % self.level)
        return b"\n".join((*about, self.keys.tobytes()))

    def tensors(self) -> Tensors:
        level = np.array([self.level], np.uint64)
        return {
            _KEYS: self.keys,
            _LEVEL: level,
            **{name: _bytes(value) for name, value in zip(_PROOFS, self._proofs, strict=True)},
        }

    @classmethod
    def read(cls, tensors: Tensors) -> SignedKeys:
        """The inverse of `tensors`. Raises MessageError."""
        if set(tensors) != {_KEYS, _LEVEL, *_PROOFS}:
            raise MessageError(f"the tensors {sorted(tensors)[:3]} are not signed keys")
        proofs = [tensor_of(tensors, name, np.uint8, (None,)) for name in _PROOFS]
        if max(proof.size for proof in proofs) > MAX_PROOF_BYTES:
            raise MessageError(f"a certificate or signature is longer than {MAX_PROOF_BYTES} bytes")
        keys = np.asarray(tensor_of(tensors, _KEYS, np.uint8, (1 + VECTORS, KEY_BYTES)), np.uint8)
        level = int(np.asarray(tensor_of(tensors, _LEVEL, np.uint64, (1,)))[0])
        return cls(keys, level, proofs[0].tobytes(), proofs[1].tobytes())

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
    tensors: dict[str, NDArray[np.generic]] = {
        _KEYS: np.stack([each.keys for each in ordered]),
        _LEVEL: np.array([each.level for each in ordered], np.uint64),
    }
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
    levels = np.asarray(tensor_of(tensors, _LEVEL, np.uint64, (len(keys),)))
    rows = zip(keys, levels, certificates, signatures, strict=True)
    signed = {
        name: SignedKeys(np.asarray(row, np.uint8), int(level), certificate, signature)
        for name, (row, level, certificate, signature) in zip(decoded, rows, strict=True)
    }
    if len(signed) != len(decoded):
        raise MessageError("the roster has a device twice")
    return signed


def roster_of(signed: Mapping[str, SignedKeys], context: bytes) -> Roster:
    """Raises MessageError if there are too few devices."""
    names = sorted(signed)
    about = b" ".join((context, *(b"%d" % signed[name].level for name in names)))
    try:
        return Roster(names, np.stack([signed[name].keys for name in names]), about)
    except (SecureAggregationError, ValueError) as error:
        raise MessageError(str(error)) from error


def thin_level(levels: Iterable[int], highest: int) -> int:
    """The lowest level, up to `highest`, that some but fewer than MIN_DEVICES of these devices train; 0 if there is
    none. The sum of its block would be of so few devices."""
    trained = list(levels)
    counts = ((level, sum(each >= level for each in trained)) for level in range(1, highest + 1))
    return next((level for level, count in counts if 0 < count < MIN_DEVICES), 0)


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
