"""python -m benchmarks.secure_aggregation: what secure sums cost each device and the server, in bytes and seconds.

One process computes for one device of a fleet and for the server; the other devices are only simulated as far as these
two need them. The vector is that of a statistics round with 100 classes and 384 features, or of the given length.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import typer
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from numpy.typing import NDArray
from pydantic import BaseModel

from devices.provisioning.authority import CLIENT, make_authority
from fedfmsl.algorithms.arrays import Tensors
from fedfmsl.algorithms.fixed_point import fixed_point
from fedfmsl.algorithms.secure_aggregation import Roster, Secrets, held_members, unmask
from fedfmsl.common.cli import application
from fedfmsl.protocol.encoding import SUMS
from fedfmsl.protocol.secure_sums import OPENED, SHARES, SignedKeys, roster_tensors
from fedfmsl.protocol.tensors import pack

DEVICES = (10, 100, 300)
LOST = 0.05  # share of the devices that are lost after they have sent their shares
VALUES = 100 * 384 + 100 + 1
COLUMNS = (
    "devices",
    "sent by a device (KB)",
    "received by a device (KB)",
    "plain sum (KB)",
    "seconds on a device",
    "seconds on the server",
)

app = application()


class Header(BaseModel):
    """Stands for the header of an update."""


@dataclass(frozen=True)
class Costs:
    """Bytes of one device, without headers of chunks. Seconds of one device and of the server."""

    sent: int
    received: int
    plain: int
    device_seconds: float
    server_seconds: float


class Stopwatch:
    def __init__(self) -> None:
        self.seconds = 0.0

    def time(self, function: Callable[[], NDArray[np.generic]]) -> NDArray[np.generic]:
        started = time.perf_counter()
        result = function()
        self.seconds += time.perf_counter() - started
        return result


@app.command()
def secure_aggregation(
    devices: list[int] = typer.Option(list(DEVICES), min=3, help="Numbers of devices."),
    values: int = typer.Option(VALUES, min=1, help="Length of the vector that is summed."),
) -> None:
    """Measure one sum and print the table."""
    print(f"| {' | '.join(COLUMNS)} |")
    print("|---:" * len(COLUMNS) + "|")
    for count in devices:
        costs = measure(count, values)
        cells = [count, *(f"{size / 1000:,.0f}" for size in (costs.sent, costs.received, costs.plain))]
        print(
            f"| {' | '.join(map(str, cells))} | {costs.device_seconds:.2f} | {costs.server_seconds:.2f} |", flush=True
        )


def measure(count: int, values: int) -> Costs:
    """The costs of a sum over `count` devices, of which the share LOST is lost."""
    secrets = [Secrets.new() for _ in range(count)]
    names = [f"device-{number:04}" for number in range(count)]
    signed = [SignedKeys(each.public_keys, 1, *_proofs()) for each in secrets]
    roster = Roster(names, np.stack([each.keys for each in signed]), b"benchmark")
    survivors = range(int(LOST * count), count)
    everybody, remaining, first = set(range(count)), set(survivors), survivors[0]
    on_device, on_server = Stopwatch(), Stopwatch()
    words = fixed_point(np.random.default_rng(0).normal(size=values))

    own = np.asarray(on_device.time(lambda: secrets[first].encrypted_shares(roster, first)), np.uint8)
    shares = {first: own, **{u: secrets[u].encrypted_shares(roster, u) for u in everybody - {first}}}
    masked = on_device.time(lambda: secrets[first].mask(roster, first, 0, everybody, words))
    total = np.asarray(masked, np.uint64).copy()
    for u in remaining - {first}:
        total += secrets[u].mask(roster, u, 0, everybody, words)

    def opened_by(u: int) -> NDArray[np.uint8]:
        for_u = {member: shares[member] for member in held_members(roster, u, everybody)}
        return secrets[u].open_shares(roster, u, 0, everybody, remaining, for_u)

    opened = {first: np.asarray(on_device.time(lambda: opened_by(first)), np.uint8)}
    opened |= {u: opened_by(u) for u in remaining - {first}}
    result = on_server.time(lambda: unmask(roster, 0, everybody, remaining, total, opened))
    assert np.array_equal(result, words * np.uint64(len(remaining)))
    sent: Sequence[Tensors] = (signed[first].tensors(), {SHARES: own}, {SUMS: masked}, {OPENED: opened[first]})
    all_shares = np.stack([shares[u] for u in sorted(shares)])
    received = (roster_tensors(dict(zip(names, signed, strict=True))), {SHARES: all_shares})
    return Costs(
        sent=sum(map(_size, sent)),
        received=sum(map(_size, received)),
        plain=4 * values,
        device_seconds=on_device.seconds,
        server_seconds=on_server.seconds,
    )


@cache
def _proofs() -> tuple[bytes, bytes]:
    """A certificate and a signature of usual length."""
    issued = make_authority("benchmark").issue("device-0000", [CLIENT])
    return issued.certificate.public_bytes(Encoding.DER), issued.key.sign(b"", ECDSA(SHA256()))


def _size(tensors: Tensors) -> int:
    return len(pack(Header(), tensors))


if __name__ == "__main__":
    app()
