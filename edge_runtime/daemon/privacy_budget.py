"""The privacy budget of a device over all its runs (ours): ε against the server and the other devices, none of which
work together.

An update is recorded before it is in the outbox, from where it leaves. A process that ends in between computes it
again, with other noise. Then only that one leaves, so it counts once. In a session that the device enters again, it
counts again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from edge_runtime.store.budget_store import BudgetStore, Spent
from fedfmsl.algorithms.accounting import gaussian_epsilon, strongest_mu_squared
from fedfmsl.errors import RunError
from fedfmsl.protocol.messages import NOISED, Round, Stage

DELTA = 1e-5
REVEALING = (*NOISED, Stage.HOLDERS, Stage.HEAD)  # stages whose updates depend on the samples of the training split
LEADING = (*REVEALING, Stage.KEYS, Stage.SHARES)  # and those that lead to such an update


@dataclass(frozen=True)
class PrivacyBudget:
    """`limit`: the ε that this device may reach; None if there is no limit."""

    store: BudgetStore
    limit: float | None = None

    def refusal(self, round_: Round) -> str:
        """Why this device takes no part in the round, or ""."""
        if self.limit is None or round_.stage not in LEADING or _is_recorded(spent := self.store.read(), round_):
            return ""
        cap = f"its --max-epsilon {self.limit:g}"
        if round_.privacy is None:
            return f"{cap} allows no update without noise (--dp-noise of the server)"
        if spent.unbounded:
            return f"{cap} is passed: {_why_unbounded(spent)}; delete STATE/privacy to count from now on"
        cost = _cost(round_)
        after = gaussian_epsilon(spent.mu_squared + cost, DELTA)
        return f"{cap} would be passed: ε {after:.3g} after this round" if after > self.limit else ""

    def record(self, round_: Round) -> None:
        """To be called before the update of the round leaves the device. Raises RunError if the device takes no part,
        OSError if the disk is full."""
        refused = self.refusal(round_)
        if refused:
            raise RunError(f"round {round_.round}: {refused}")
        spent = self.store.read()
        if round_.stage not in REVEALING or _is_recorded(spent, round_):
            return
        if round_.privacy is None:
            if not spent.unbounded:
                self.store.write(spent.model_copy(update={"unbounded": True}))
            return
        cost = _cost(round_)
        self.store.write(
            Spent(
                mu_squared=spent.mu_squared + cost,
                updates=spent.updates + 1,
                unbounded=spent.unbounded,
                damaged=spent.damaged,
                session=round_.session,
                round=round_.round,
                cost=cost,
            )
        )

    def forget_round(self) -> None:
        """To be called before the device enters another session: its last update may have left."""
        spent = self.store.read()
        if spent.round:
            self.store.write(spent.model_copy(update={"session": Spent().session, "round": 0, "cost": 0.0}))


def epsilon_of(spent: Spent) -> float | None:
    """ε at DELTA of the updates so far. None if no ε holds, and before the first update."""
    return gaussian_epsilon(spent.mu_squared, DELTA) if spent.updates and not spent.unbounded else None


def describe_budget(spent: Spent) -> str:
    """The budget that a device has used; "" before its first update."""
    if spent.unbounded and not (spent.damaged or spent.updates):
        return "none was asked for: the runs of this device had no noise (--dp-noise of the server)"
    if spent.unbounded:
        return f"no ε holds: {_why_unbounded(spent)}"
    epsilon = epsilon_of(spent)
    if epsilon is None:
        return ""
    count = f"{spent.updates} noised update{'s' if spent.updates > 1 else ''}"
    return f"ε {epsilon:.3g} (δ = {DELTA:g}) after {count}"


def _why_unbounded(spent: Spent) -> str:
    return "the record of its updates was damaged" if spent.damaged else "it has sent updates without noise"


def _cost(round_: Round) -> float:
    """μ² of the round's update; infinite without noise."""
    return strongest_mu_squared(round_.privacy, round_.secure) if round_.privacy is not None else math.inf


def _is_recorded(spent: Spent, round_: Round) -> bool:
    """Not if the round is announced again with less noise."""
    return (spent.session, spent.round) == (round_.session, round_.round) and _cost(round_) <= spent.cost
