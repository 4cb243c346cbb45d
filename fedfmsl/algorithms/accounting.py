"""The privacy budget that a run has used, by the accountant of Google's differential privacy library."""

from __future__ import annotations

from fedfmsl.algorithms.checks import check_number
from fedfmsl.algorithms.privacy import Privacy


def epsilon(privacy: Privacy, rounds: int, delta: float) -> float:
    """ε of (ε, δ)-differential privacy for one device's whole set of samples, after the aggregates of `rounds` rounds.

    The round of statistics and each round of stages 1 and 2 is one Gaussian mechanism with the same noise multiplier.
    Rényi accounting (Mironov, CSF 2017). Selecting only some devices for a round does not lower ε: the announcement
    names them, and amplification by sampling needs a secret sample. ε is for a device that was selected in all rounds.

    Holds for the plain mean of at least `shares` fp32 updates. Robust rules, and encodings that round between the
    noise and the sum, are outside the proof.

    Needs `dp-accounting` (the extra `server`) if `rounds` is above 0. Raises ValueError unless `rounds` is at least 0
    and `delta` is between 0 and 1, both excluded.
    """
    check_number("rounds", rounds, at_least=0)
    check_number("delta", delta, above=0, below=1)
    if not rounds:
        return 0.0
    # imported here: it takes a second, and few runs are private
    from dp_accounting import GaussianDpEvent
    from dp_accounting.rdp import RdpAccountant

    return float(RdpAccountant().compose(GaussianDpEvent(privacy.noise_multiplier), rounds).get_epsilon(delta))
