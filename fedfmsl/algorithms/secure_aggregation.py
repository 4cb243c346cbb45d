"""Secure aggregation: the server learns the sum of the devices' vectors, and no single vector (Bonawitz et al., CCS
2017), with the neighbour graph of SecAgg+ (Bell et al., CCS 2020).

    secrets = [Secrets.new() for _ in names]                                 # one on each device
    roster = Roster(names, np.stack([s.public_keys for s in secrets]), context)
    shares[u] = secrets[u].encrypted_shares(roster, u)                       # for the holders of u
    masked[u] = secrets[u].mask(roster, u, index, members, fixed_point(vector))
    opened[u] = secrets[u].open_shares(roster, u, index, members, survivors, shares)
    total = numbers(unmask(roster, index, members, survivors, masked_total, opened))

Devices are positions 0 … n-1 in the roster. `members` are the devices that mask vector `index`; `survivors` are those
whose masked vector has arrived. Every device has a seed for each vector's self mask and one for its pairwise masks. Its
*holders*, itself and its neighbours, hold Shamir shares of both. Once a vector has arrived, the server may learn its
self mask; if it has not, the pairwise masks. Both together would reveal it, so a holder opens at most one of the two.
A seed needs more than two thirds of the holders: the server would need a third of them on its side to get both.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from fedfmsl.algorithms.fixed_point import Words

Bytes = NDArray[np.uint8]

VECTORS = 2  # vectors that one set of keys can mask
MIN_DEVICES = 3  # of a sum of two, each of the two knows the other's part
NEIGHBOURS = 32  # even; with up to 33 devices all are neighbours
SEED_BYTES, KEY_BYTES, _NONCE_BYTES, _TAG_BYTES = 16, 32, 12, 16
NO_SHARE = bytes(SEED_BYTES)  # no share of a random seed is zeros
SHARE_BYTES = _NONCE_BYTES + 2 * VECTORS * SEED_BYTES + _TAG_BYTES  # encrypted, for one holder


class SecureAggregationError(Exception):
    """What was received cannot be used: too few shares, an invalid key, an impossible set of devices."""


def threshold(holders: int) -> int:
    """How many of the holders of a seed recover it: more than two thirds."""
    return 2 * holders // 3 + 1


@dataclass(frozen=True, eq=False)
class Roster:
    """The devices of one execution of the protocol.

    `names` in ascending order. `keys` (n, 1 + VECTORS, 32): X25519 public keys, the first for encryption, the others
    for the pairwise masks. `context` distinguishes this execution from all others. Raises SecureAggregationError if
    there are fewer than MIN_DEVICES, or two have the same name.
    """

    names: Sequence[str]
    keys: Bytes
    context: bytes

    def __post_init__(self) -> None:
        if len(self.names) < MIN_DEVICES:
            raise SecureAggregationError(f"{len(self.names)} devices are fewer than {MIN_DEVICES}")
        if list(self.names) != sorted(set(self.names)) or self.keys.shape != (len(self.names), 1 + VECTORS, KEY_BYTES):
            raise SecureAggregationError("the roster's names and keys are not one of each, in order")

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of everything in the roster. All keys and masks depend on it."""
        parts = [self.context, *(name.encode() for name in self.names), self.keys.tobytes()]
        return hashlib.sha256(b"".join(len(part).to_bytes(4, "big") + part for part in parts)).digest()

    @cached_property
    def _holders(self) -> list[tuple[int, ...]]:
        n, half = len(self.names), NEIGHBOURS // 2
        if n <= NEIGHBOURS + 1:
            return [tuple(range(n))] * n
        ring = sorted(range(n), key=lambda u: hashlib.sha256(self.digest + u.to_bytes(4, "big")).digest())
        return [
            tuple(sorted(ring[(place + step) % n] for step in range(-half, half + 1)))
            for _, place in sorted((u, place) for place, u in enumerate(ring))
        ]

    def holders(self, device: int) -> tuple[int, ...]:
        """The device itself and its neighbours, in ascending order. Neighbourhood is mutual."""
        return self._holders[device]

    def neighbours(self, device: int, members: Collection[int]) -> list[int]:
        return [other for other in self.holders(device) if other != device and other in members]

    def enough(self, devices: Collection[int], needed: Collection[int]) -> bool:
        """Whether `devices`, MIN_DEVICES or more, hold the seeds of all devices in `needed`."""
        return len(devices) >= MIN_DEVICES and all(
            sum(holder in devices for holder in self.holders(u)) >= threshold(len(self.holders(u))) for u in needed
        )


@dataclass(frozen=True)
class Secrets:
    """A device's secrets in one execution, all derived from `seed` of 32 random bytes."""

    seed: bytes

    @classmethod
    def new(cls) -> Secrets:
        return cls(secrets.token_bytes(32))

    @cached_property
    def _encryption(self) -> X25519PrivateKey:
        return _private_key(_derived(self.seed, b"encryption", SEED_BYTES))

    @cached_property
    def _pairwise(self) -> list[bytes]:
        return [_derived(self.seed, b"pairwise %d" % index, SEED_BYTES) for index in range(VECTORS)]

    @cached_property
    def _own(self) -> list[bytes]:
        return [_derived(self.seed, b"own %d" % index, SEED_BYTES) for index in range(VECTORS)]

    @property
    def public_keys(self) -> Bytes:
        """(1 + VECTORS, 32), a device's row of the roster's keys."""
        private = [self._encryption, *map(_private_key, self._pairwise)]
        return np.stack([np.frombuffer(key.public_key().public_bytes_raw(), np.uint8) for key in private])

    def encrypted_shares(self, roster: Roster, device: int) -> Bytes:
        """Shares of this device's seeds (H, SHARE_BYTES), a row for each of its holders in order.

        Their randomness is the operating system's: a repeated call gives other shares, which do not fit together with
        the first ones.
        """
        from Crypto.Protocol.SecretSharing import Shamir  # only a run with secure aggregation loads it

        holders = roster.holders(device)
        seeds = list(chain(*zip(self._pairwise, self._own, strict=True)))
        split = [Shamir.split(threshold(len(holders)), len(holders), seed) for seed in seeds]
        rows = []
        for place, holder in enumerate(holders):
            plain, nonce = b"".join(shares[place][1] for shares in split), secrets.token_bytes(_NONCE_BYTES)
            cipher = AESGCM(self._shared_key(roster, holder))
            rows.append(nonce + cipher.encrypt(nonce, plain, _route(roster, device, holder)))
        return np.frombuffer(b"".join(rows), np.uint8).reshape(len(holders), SHARE_BYTES)

    def mask(self, roster: Roster, device: int, index: int, members: Collection[int], words: Words) -> Words:
        """`words` (P,) with this device's masks of vector `index`."""
        masked = words + _stream(self._own[index], b"own", words.size)
        for other in roster.neighbours(device, members):
            _add_pairwise(masked, roster, index, self._pairwise[index], device, other)
        return masked

    def open_shares(
        self,
        roster: Roster,
        device: int,
        index: int,
        members: Collection[int],
        survivors: Collection[int],
        shares: Mapping[int, Bytes],
    ) -> Bytes:
        """This device's shares (M, 16) of the seeds of the members that it holds, in ascending order: of a survivor's
        self mask, else of the pairwise masks. `shares` are the results of `encrypted_shares` by device. A share that
        is damaged, or was encrypted for another roster, is opened as NO_SHARE: a member that sends such shares must
        not keep the others from answering.

        Raises SecureAggregationError if the sets of devices are impossible.
        """
        if not set(survivors) <= set(members) or device not in survivors or len(survivors) < MIN_DEVICES:
            raise SecureAggregationError("the survivors are fewer than three, or not among the members")
        opened = []
        for member in held_members(roster, device, members):
            sealed = shares[member][roster.holders(member).index(device)].tobytes()
            cipher = AESGCM(self._shared_key(roster, member))
            try:
                plain = cipher.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], _route(roster, member, device))
            except InvalidTag:
                opened.append(np.frombuffer(NO_SHARE, np.uint8))
                continue
            start = (2 * index + (member in survivors)) * SEED_BYTES
            opened.append(np.frombuffer(plain[start : start + SEED_BYTES], np.uint8))
        return np.stack(opened)

    def _shared_key(self, roster: Roster, other: int) -> bytes:
        shared = _agreed(self._encryption, roster.keys[other, 0])
        return _derived(shared, b"shares" + roster.digest, SEED_BYTES)


def check_public_keys(keys: Bytes) -> None:
    """Raises SecureAggregationError if one of the keys (1 + VECTORS, 32) is of small order: no device could use it."""
    private = X25519PrivateKey.generate()
    for key in keys:
        _agreed(private, key)


def held_members(roster: Roster, device: int, members: Collection[int]) -> list[int]:
    """The members whose seeds the device holds, in ascending order: the rows of its opened shares."""
    return [member for member in roster.holders(device) if member in members]


def unmask(
    roster: Roster,
    index: int,
    members: Collection[int],
    survivors: Collection[int],
    masked: Words,
    opened: Mapping[int, Bytes],
) -> Words:
    """The sum of the survivors' vectors from the sum of their masked vectors (P,). `opened`: the results of
    `open_shares` by device.

    Raises SecureAggregationError if the shares of a seed are too few, or do not recover it.
    """
    total = masked.copy()
    for member in sorted(members):
        if member not in survivors and not roster.neighbours(member, survivors):
            continue
        seed = _recovered(roster, members, member, opened)
        if member in survivors:
            total -= _stream(seed, b"own", total.size)
            continue
        if _public_key(seed) != roster.keys[member, 1 + index].tobytes():
            raise SecureAggregationError(f"the shares of {roster.names[member]} do not recover its key")
        for other in roster.neighbours(member, survivors):
            _add_pairwise(total, roster, index, seed, member, other)  # what `other` added, with the opposite sign
    return total


def _recovered(roster: Roster, members: Collection[int], member: int, opened: Mapping[int, Bytes]) -> bytes:
    from Crypto.Protocol.SecretSharing import Shamir

    holders = roster.holders(member)
    found = [
        (place + 1, opened[holder][held_members(roster, holder, members).index(member)].tobytes())
        for place, holder in enumerate(holders)
        if holder in opened
    ]
    shares = [(place, share) for place, share in found if share != NO_SHARE]
    needed = threshold(len(holders))
    if len(shares) < needed:
        raise SecureAggregationError(f"{len(shares)} shares of {roster.names[member]}, fewer than {needed}")
    return bytes(Shamir.combine(shares[:needed]))


def _add_pairwise(words: Words, roster: Roster, index: int, seed: bytes, device: int, other: int) -> None:
    """Adds the mask that `device` shares with `other`: of the two, the one adds what the other subtracts."""
    shared = _agreed(_private_key(seed), roster.keys[other, 1 + index])
    stream = _stream(shared, b"pairwise %d" % index + roster.digest, words.size)
    if device < other:
        words += stream
    else:
        words -= stream


def _stream(secret: bytes, info: bytes, count: int) -> Words:
    """AES-128 in counter mode. Each derived key makes one stream."""
    cipher = Cipher(algorithms.AES(_derived(secret, b"mask " + info, SEED_BYTES)), modes.CTR(bytes(16)))
    return np.frombuffer(cipher.encryptor().update(bytes(8 * count)), "<u8").astype(np.uint64, copy=False)


def _agreed(private: X25519PrivateKey, public: Bytes) -> bytes:
    """Raises SecureAggregationError if the public key is not one (of small order)."""
    try:
        return private.exchange(X25519PublicKey.from_public_bytes(public.tobytes()))
    except ValueError:
        raise SecureAggregationError("a public key is invalid") from None


def _private_key(seed: bytes) -> X25519PrivateKey:
    return X25519PrivateKey.from_private_bytes(_derived(seed, b"x25519", KEY_BYTES))


def _public_key(seed: bytes) -> bytes:
    return _private_key(seed).public_key().public_bytes_raw()


def _derived(secret: bytes, info: bytes, length: int) -> bytes:
    return HKDF(SHA256(), length, salt=None, info=b"fedfmsl secure aggregation " + info).derive(secret)


def _route(roster: Roster, sender: int, holder: int) -> bytes:
    """Associated data of an encrypted share."""
    return roster.digest + sender.to_bytes(4, "big") + holder.to_bytes(4, "big")
