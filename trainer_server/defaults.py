"""Numbers of rounds and devices of a run. Other programs name them in their help."""

from __future__ import annotations

STAGE1_ROUNDS, STAGE2_ROUNDS = 12, 5
MAX_ROUNDS = 100_000  # of a stage
MAX_DEVICES = 100_000
