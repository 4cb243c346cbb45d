"""A device's part of secure sums (see `fedfmsl.protocol.secure_sums`), and what it refuses to the server.

It records what it sends before it sends it, so that after a restart it sends the same and never the opposite: it masks
a vector only once for each set of keys, and opens the shares of a vector for one set of survivors only. A device that
enters another session has no keys of the former one any more.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from edge_runtime.store import DeviceStore
from edge_runtime.store.secure_store import MaskedVector, NoKeysError, SecureRecord
from edge_runtime.training.stages import StageResult
from fedfmsl.algorithms.arrays import Tensors
from fedfmsl.algorithms.secure_aggregation import (
    MIN_DEVICES,
    Roster,
    Secrets,
    SecureAggregationError,
    held_members,
)
from fedfmsl.errors import ClockError, MessageError, RunError
from fedfmsl.protocol.encoding import SUMS
from fedfmsl.protocol.messages import Globals, Round, Stage
from fedfmsl.protocol.secure_sums import (
    OPENED,
    SHARES,
    SignedKeys,
    context,
    read_roster,
    roster_of,
    tensor_of,
    thin_level,
    vector_of,
)
from fedfmsl.protocol.tensors import unpack
from fedfmsl.transport.identity import read_identity
from fedfmsl.transport.signatures import Authorities, Signer

logger = logging.getLogger(__name__)

KINDS = {Stage.HOLDERS: 2, Stage.STATISTICS: 1, Stage.HEAD: 1}  # how many different sums of each a session has


class SecureRounds:
    def __init__(self, store: DeviceStore, name: str, identity: Path | None) -> None:
        """Raises ConfigError if the identity cannot sign."""
        self._store = store
        self._name = name
        self._identity = identity
        self._authorities = None
        if identity and Signer.load(identity):
            self._authorities = Authorities(read_identity(identity).authorities)
        else:
            logger.info(
                "secure sums without a certificate: the keys of the devices are not signed, so they protect from a "
                "server that only reads, not from one that invents devices"
            )

    def exchange(self, round_: Round, level_cap: int) -> StageResult:
        """The answer to a round `keys`, `shares` or `unmask`. Raises RunError if the device refuses it, NoKeysError if
        it has no keys for it, ClockError as `Authorities.check` does."""
        answers: dict[Stage, Callable[[Round], Tensors]] = {
            Stage.KEYS: partial(self._keys, level_cap=level_cap),
            Stage.SHARES: self._shares,
            Stage.UNMASK: self._unmask,
        }
        return StageResult(self._checked(round_, answers[round_.stage]))

    def level(self, round_: Round) -> int:
        """The level that the device has announced with its keys. Raises NoKeysError if it has none."""
        return self._record(round_).level

    def mask(self, round_: Round, result: StageResult) -> StageResult:
        """The result with masked sums. Raises RunError if the device refuses it, NoKeysError as `level` does."""
        return replace(result, tensors=self._checked(round_, lambda _: self._masked(round_, result.tensors)))

    def _checked(self, round_: Round, answer: Callable[[Round], Tensors]) -> Tensors:
        try:
            return answer(round_)
        except ClockError:
            raise
        except (MessageError, SecureAggregationError) as error:
            raise _refusal(round_, error) from error

    def _keys(self, round_: Round, level_cap: int) -> Tensors:
        before = self._store.secure.read()
        opened = before.opened if before is not None and before.session == round_.session else ()
        if before is None or (before.session, before.keys_round) != (round_.session, round_.round):
            seed = Secrets.new().seed.hex()
            before = SecureRecord(
                session=round_.session,
                keys_round=round_.round,
                level=min(round_.level, level_cap),
                seed=seed,
                opened=opened,
            )
            self._store.secure.write(before)
        signed = SignedKeys(_secrets(before).public_keys, before.level)
        signer = Signer.load(self._identity) if self._identity else None  # its certificate may have been renewed
        if signer is not None:
            message = signed.message(self._name, context(round_.run, round_.session, round_.round))
            signed = replace(signed, certificate=signer.certificate, signature=signer.sign(message))
        return signed.tensors()

    def _shares(self, round_: Round) -> Tensors:
        record, signed = self._record(round_), read_roster(self._blob(round_.roster))
        about = context(round_.run, round_.session, record.keys_round)
        for name, each in signed.items():
            if self._authorities is not None:
                self._authorities.check(name, each.certificate, each.signature, each.message(name, about))
        roster, secrets = roster_of(signed, about), _secrets(record)
        own = signed.get(self._name)
        if own is None or own.level != record.level or not np.array_equal(own.keys, secrets.public_keys):
            raise MessageError("the roster does not have this device's keys")
        if record.roster not in ("", roster.digest.hex()):
            raise MessageError("it has published another roster before")
        self._store.secure.write(record.model_copy(update={"roster": roster.digest.hex()}))
        return {SHARES: secrets.encrypted_shares(roster, roster.names.index(self._name))}

    def _masked(self, round_: Round, tensors: Tensors) -> Tensors:
        record, index, kind = self._record(round_), vector_of(round_), f"{round_.stage.value} {round_.index}"
        if kind in record.opened or round_.index >= KINDS.get(round_.stage, round_.of):
            raise MessageError("it has asked for these sums before; two sums over different devices reveal a device's")
        roster, levels = self._roster(round_, record)
        members = _positions(roster, round_.chosen)
        level = round_.level if round_.stage is Stage.GLOBAL else 0
        _check_levels(levels, round_.chosen, level)
        if len(members) < MIN_DEVICES or self._name not in round_.chosen:
            raise MessageError(f"{len(members)} devices are too few to hide this one")
        least = round_.privacy.shares if round_.privacy is not None else 0
        _check_noise(members, least)
        vector = MaskedVector(kind=kind, level=level, round=round_.round, members=round_.chosen, least=least)
        if record.vectors.get(index, vector) != vector:
            raise MessageError("it asks for the same vector with other masks")
        self._store.secure.write(record.model_copy(update={"vectors": {**record.vectors, index: vector}}))
        words = np.asarray(tensors[SUMS], np.uint64)
        return {SUMS: _secrets(record).mask(roster, roster.names.index(self._name), index, members, words)}

    def _unmask(self, round_: Round) -> Tensors:
        record, index = self._record(round_), vector_of(round_)
        roster, levels = self._roster(round_, record)
        vector = record.vectors.get(index)
        if vector is None:
            raise MessageError("it asks for shares of a vector that this device has not masked")
        if vector.survivors not in ((), round_.chosen):
            raise MessageError("it asks for the shares of other devices than before, which together reveal a vector")
        members, survivors = (_positions(roster, names) for names in (vector.members, round_.chosen))
        _check_levels(levels, round_.chosen, vector.level)
        _check_noise(survivors, vector.least)
        device = roster.names.index(self._name)
        shape = (len(roster.names), len(roster.holders(device)), None)
        published = np.asarray(tensor_of(self._blob(round_.shares), SHARES, np.uint8, shape), np.uint8)
        shares = {member: published[member] for member in held_members(roster, device, members)}
        opened = _secrets(record).open_shares(roster, device, index, members, survivors, shares)
        changes = {
            "vectors": {**record.vectors, index: vector.model_copy(update={"survivors": round_.chosen})},
            "opened": tuple(sorted({*record.opened, vector.kind})),
        }
        self._store.secure.write(record.model_copy(update=changes))
        return {OPENED: opened}

    def _record(self, round_: Round) -> SecureRecord:
        record = self._store.secure.read()
        if record is None or record.session != round_.session or record.keys_round >= round_.round:
            raise NoKeysError(
                f"round {round_.round} ({round_.stage.value}) needs the keys of an earlier round, which are not in "
                f"{self._store.root}: another process of this name sent them, or the folder is new; this device takes "
                "part again with the next keys"
            )
        return record

    def _roster(self, round_: Round, record: SecureRecord) -> tuple[Roster, Mapping[str, int]]:
        """The roster for which this device has made shares, so its keys are already checked, and the devices'
        levels."""
        about = context(round_.run, round_.session, record.keys_round)
        signed = read_roster(self._blob(round_.roster))
        roster = roster_of(signed, about)
        if roster.digest.hex() != record.roster:
            raise MessageError("the roster is another one than this device has made shares for")
        return roster, {name: each.level for name, each in signed.items()}

    def _blob(self, sha256: str) -> Tensors:
        blob = self._store.globals.read(sha256) if sha256 else None
        if blob is None:
            raise MessageError("it names no roster or shares, or they are damaged on the disk")
        return unpack(blob, Globals)[1]


def _refusal(round_: Round, error: Exception) -> RunError:
    where = f"round {round_.round} ({round_.stage.value})"
    return RunError(f"refused to the server in {where}: {error}; this device takes no part in this secure aggregation")


def _secrets(record: SecureRecord) -> Secrets:
    return Secrets(bytes.fromhex(record.seed))


def _check_levels(levels: Mapping[str, int], names: tuple[str, ...], highest: int) -> None:
    """Raises MessageError if a block was trained by so few devices that their sum reveals them."""
    level = thin_level((levels.get(name, 0) for name in names), highest)
    if level:
        raise MessageError(f"fewer than {MIN_DEVICES} devices train at level {level} or above")


def _check_noise(devices: frozenset[int], least: int) -> None:
    """Raises MessageError if the sum over so few devices has not the whole noise."""
    if len(devices) < least:
        raise MessageError(f"the noise is whole from {least} devices on, and the sum is of {len(devices)}")


def _positions(roster: Roster, names: tuple[str, ...]) -> frozenset[int]:
    """Raises MessageError if a name is not in the roster."""
    positions = {name: position for position, name in enumerate(roster.names)}
    if not positions.keys() >= set(names):
        raise MessageError("it names devices that are not in the roster")
    return frozenset(positions[name] for name in names)
