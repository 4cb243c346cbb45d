"""FedProx (Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020, algorithm 2), with LoRA.

FedIT with the term μ/2 · ‖θ - θᵗ‖² in each device's loss; θᵗ is what the device has received. μ is 1, the best of
0.001, 0.01, 0.1 and 1, which the paper tries, on held-out samples. The paper also lets devices take fewer steps; here
all take the same number.
"""

from __future__ import annotations

from simulation.methods.fedit import FedIT


class FedProx(FedIT):
    name = "fedprox"
    title = "FedProx"
    source = "Li et al., MLSys 2020"
    proximal = 1.0
    restricted = False
