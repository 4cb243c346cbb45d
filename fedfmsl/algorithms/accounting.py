"""The privacy budget ε that rounds with noise use, for each observer.

Each noised update is one Gaussian mechanism. Its μ is the largest change that one device can cause, over the standard
deviation of the noise that an observer does not know. Mechanisms of μ₁, μ₂, … together are as good as one with
μ² = μ₁² + μ₂² + … (Dong, Roth and Su, JRSSB 2022), also if later ones depend on earlier ones, so the sum of μ² is all
that has to be remembered. ε follows from it exactly (Balle and Wang, ICML 2018, Theorem 8).

ε compares a run with a device's samples to one in which its updates are zeros. For two sets of samples, double μ.
"""

from __future__ import annotations

import math
from enum import Enum

from fedfmsl.algorithms.checks import check_number
from fedfmsl.algorithms.privacy import Privacy

MOST_HOLDERS = 33  # of the shares of a device's seeds in secure aggregation
_STEPS = 60  # of a bisection


class Observer(str, Enum):
    """Who tries to learn about a device's samples from what a run shows."""

    PUBLIC = "public"  # sees the globals of all rounds
    PARTICIPANT = "participant"  # another device: also knows its own share of the noise
    SERVER = "server"  # sees single updates; with secure aggregation only their sum
    COLLUDERS = "colluders"  # the server together with some devices, which know their shares of the noise


def mu_squared(privacy: Privacy, observer: Observer, secure: bool, colluders: int = 1) -> float:
    """μ² of one noised update, for an observer that the device is not part of.

    The sum has at least `shares` shares of the noise, and each protects as much as all others: an observer that knows k
    of them faces `shares` - k, but at least the device's own. A third of the devices together with the server can
    undo secure aggregation (see `fedfmsl.algorithms.secure_aggregation`), and then face only the device's own share.

    Raises ValueError unless `colluders` is at least 0.
    """
    check_number("colluders", colluders, at_least=0)
    known = {Observer.PUBLIC: 0, Observer.PARTICIPANT: 1, Observer.SERVER: 0, Observer.COLLUDERS: colluders}[observer]
    sees_updates = observer in (Observer.SERVER, Observer.COLLUDERS) and not secure
    undoes = observer is Observer.COLLUDERS and colluders > min(privacy.shares, MOST_HOLDERS) // 3
    unknown = 1 if sees_updates or undoes else max(privacy.shares - known, 1)
    return privacy.shares / unknown / privacy.noise_multiplier**2


def strongest_mu_squared(privacy: Privacy, secure: bool) -> float:
    """μ² of one noised update for the one who learns most without collusion: the server or a participant."""
    return max(mu_squared(privacy, observer, secure) for observer in (Observer.PARTICIPANT, Observer.SERVER))


def gaussian_epsilon(mu_squared: float, delta: float) -> float:
    """The smallest ε of (ε, δ)-differential privacy of Gaussian mechanisms whose μ² sum up to `mu_squared`.

    Raises ValueError unless `mu_squared` is at least 0, and `delta` between 0 and 1, both excluded.
    """
    check_number("mu_squared", mu_squared, at_least=0)
    check_number("delta", delta, above=0, below=1)
    mu = math.sqrt(mu_squared)
    if not mu or _delta(0.0, mu) <= delta:
        return 0.0
    low, high = 0.0, mu_squared / 2 + mu * math.sqrt(2 * math.log(1 / delta))  # δ of `high` is at most `delta`
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if _delta(middle, mu) <= delta else (middle, high)
    return high


def mu_squared_sums(
    privacy: Privacy, rounds: int, *, secure: bool = False, updates: int | None = None, colluders: int = 1
) -> dict[Observer, float]:
    """The sum of μ² of each observer. Sums of several runs add up. Arguments as of `epsilons`."""
    updates = rounds if updates is None else updates
    check_number("rounds", rounds, at_least=0)
    check_number("updates", updates, at_least=0)
    seen = {Observer.PUBLIC: rounds, Observer.PARTICIPANT: rounds}
    return {
        observer: (rounds if secure else seen.get(observer, updates)) * mu_squared(privacy, observer, secure, colluders)
        for observer in Observer
    }


def epsilons(
    privacy: Privacy, rounds: int, delta: float, *, secure: bool = False, updates: int | None = None, colluders: int = 1
) -> dict[Observer, float]:
    """ε of each observer for a device's whole set of samples, at δ = `delta`.

    `rounds`: rounds with noise whose sum was released. `updates`: those in which the device sent an update, also to
    rounds that were repeated; without secure aggregation the server has seen them all. Default: `rounds`. `colluders`:
    devices that work together with the server.

    Selecting only some devices for a round does not lower ε: the announcement names them, and amplification by
    sampling needs a secret sample. ε is for a device that was selected in all rounds.

    Holds for the plain mean of at least `shares` updates. Robust rules, and encodings that round between the noise and
    the sum, are outside the proof.

    Raises ValueError unless `rounds`, `updates` and `colluders` are at least 0, and `delta` is between 0 and 1, both
    excluded.
    """
    sums = mu_squared_sums(privacy, rounds, secure=secure, updates=updates, colluders=colluders)
    return {observer: gaussian_epsilon(total, delta) for observer, total in sums.items()}


def epsilon(privacy: Privacy, rounds: int, delta: float) -> float:
    """ε of the public after the aggregates of `rounds` rounds (see `epsilons`)."""
    return epsilons(privacy, rounds, delta)[Observer.PUBLIC]


def _delta(epsilon: float, mu: float) -> float:
    """The least δ for this ε: Φ(μ/2 - ε/μ) - exp(ε) · Φ(-μ/2 - ε/μ).

    With a = ε/μ - μ/2 and b = ε/μ + μ/2, exp(ε) times the density at b is the density at a, so nothing overflows.
    """
    a, b = epsilon / mu - mu / 2, epsilon / mu + mu / 2
    density = math.exp(-a * a / 2) / math.sqrt(2 * math.pi)
    first = math.erfc(a / math.sqrt(2)) / 2 if a < 0 else density * _mills(a)
    return first - density * _mills(b)


def _mills(x: float) -> float:
    """(1 - Φ(x)) over the density at x, for x of at least 0."""
    t = x / math.sqrt(2)
    if t < 20:
        return math.sqrt(math.pi / 2) * math.exp(t * t) * math.erfc(t)
    return (1 - 1 / (2 * t**2) + 3 / (4 * t**4)) / (math.sqrt(2) * t)
