"""What a private run has spent, after the accountant of Google's differential privacy library (`dp-accounting`)."""

from __future__ import annotations

from fedfmsl.protocol.messages import Privacy


def epsilon(privacy: Privacy, rounds: int, delta: float) -> float:
    """ε of (ε, δ)-differential privacy, with respect to one device's whole set of samples, after aggregates of `rounds`
    rounds have been seen (statistics, stages 1 and 2: each is one Gaussian mechanism of the same noise multiplier).

    Rényi accounting (Mironov, CSF 2017). That a round asks only a share of the devices counts for nothing: the
    announcement names those chosen, and amplification by sampling holds only for a secret sample. ε is that of the
    worst placed device, which was chosen in every one of `rounds`.

    It speaks of the plain mean of at least `shares` unencoded (fp32) updates: a robust rule, or rounding between the
    noise and the sum, is outside of the proof.
    """
    if not rounds:
        return 0.0
    # imported here: it takes a second, and few runs are private
    from dp_accounting import GaussianDpEvent
    from dp_accounting.rdp import RdpAccountant

    return float(RdpAccountant().compose(GaussianDpEvent(privacy.noise_multiplier), rounds).get_epsilon(delta))
