"""What a device has revealed in all its runs: the sum of μ² of its updates (see `fedfmsl.algorithms.accounting`).

STATE/privacy     one JSON object, kept across runs
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedfmsl.common.files import write_atomically
from fedfmsl.protocol.messages import Count, Number, Session


class Spent(BaseModel):
    """`mu_squared` is the sum over `updates` updates with noise. `unbounded`: an update without noise was sent, or an
    earlier record was `damaged`, so no ε holds. `session`, `round` and `cost` (μ²): of the last recorded update."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    mu_squared: float = Field(default=0.0, ge=0)
    updates: Count = 0
    unbounded: bool = False
    damaged: bool = False
    session: Session = "none"
    round: Number = 0
    cost: float = Field(default=0.0, ge=0)


class BudgetStore:
    def __init__(self, state: Path) -> None:
        self.path = state / "privacy"

    def read(self) -> Spent:
        """Unbounded if the file is damaged: what it counted is not known."""
        try:
            return Spent.model_validate_json(self.path.read_bytes())
        except FileNotFoundError:
            return Spent()
        except ValidationError:
            return Spent(unbounded=True, damaged=True)

    def write(self, spent: Spent) -> None:
        write_atomically(self.path, spent.model_dump_json().encode(), durable=True)
