"""The privacy budget of a device over its runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from support.bundles import Built
from support.in_process_daemon import InProcessDaemon, make_daemon
from support.training_contexts import announced_round, initial_globals

from edge_runtime.daemon.privacy_budget import DELTA, PrivacyBudget, describe_budget, epsilon_of
from edge_runtime.store.budget_store import BudgetStore, Spent
from edge_runtime.store.outbox import Outbox
from edge_runtime.store.secure_store import SecureRecord
from fedfmsl.algorithms.accounting import gaussian_epsilon
from fedfmsl.algorithms.privacy import Privacy
from fedfmsl.algorithms.sal import AllAtOnce, Sal
from fedfmsl.errors import RunError
from fedfmsl.protocol.messages import Encoding, Globals, Round, Stage, Training, Update
from fedfmsl.protocol.tensors import blob_hash, pack, unpack

PRIVACY = Privacy(clip=1.0, noise_multiplier=2.0, shares=4)


def round_of(
    number: int, stage: Stage = Stage.GLOBAL, session: str = "a", noise: float = 2.0, secure: bool = False
) -> Round:
    return Round(
        run="r",
        session=session,
        round=number,
        stage=stage,
        index=0,
        of=9,
        level=1,
        privacy=replace(PRIVACY, noise_multiplier=noise) if noise else None,
        secure=secure,
        training=Training(epochs=1, learning_rate=1.0),
        sal=Sal(AllAtOnce(), max_level=1),
    )


def test_epsilon_adds_up_over_runs_restarts_and_different_noise(tmp_path: Path) -> None:
    """Without secure aggregation the server sees updates with one of four shares of the noise; with it, a participant
    knows one of four."""
    for round_ in (
        round_of(1),
        round_of(1),  # computed again
        round_of(2, Stage.PERSONAL),
        round_of(1, session="b", noise=8.0),
        round_of(5, session="b", noise=8.0, secure=True),
        round_of(6, Stage.UNMASK, session="b", secure=True),
        round_of(7, Stage.EVALUATE, session="b"),
    ):
        PrivacyBudget(BudgetStore(tmp_path)).record(round_)
    spent = BudgetStore(tmp_path).read()
    assert spent.mu_squared == pytest.approx(2 * 4 / 4 + 4 / 64 + (4 / 3) / 64) and spent.updates == 4
    assert describe_budget(spent) == (
        f"ε {gaussian_epsilon(spent.mu_squared, DELTA):.3g} (δ = 1e-05) after 4 noised updates"
    )


def test_a_device_takes_no_part_in_what_would_pass_its_limit(tmp_path: Path) -> None:
    once, twice = (gaussian_epsilon(count * 4 / 4, DELTA) for count in (1, 2))
    budget = PrivacyBudget(BudgetStore(tmp_path), limit=(once + twice) / 2)
    for stage in (Stage.KEYS, Stage.SHARES):  # they cost nothing, but lead to a masked update that does
        assert "allows no update without noise" in budget.refusal(round_of(1, stage, noise=0, secure=True))
        assert budget.refusal(round_of(1, stage, secure=True)) == ""
    budget.record(round_of(2))
    assert budget.refusal(round_of(2)) == ""  # computed again
    assert budget.refusal(round_of(2, noise=1.0)) != ""  # with less noise
    assert "allows no update without noise" in budget.refusal(round_of(2, noise=0))
    reason = f"its --max-epsilon {budget.limit:.6g} would be passed: ε {twice:.3g} after this round"
    assert budget.refusal(round_of(3)) == reason
    with pytest.raises(RunError, match="round 3: its --max-epsilon"):
        budget.record(round_of(3))
    assert budget.refusal(round_of(3, noise=20.0)) == budget.refusal(round_of(4, Stage.UNMASK, secure=True)) == ""
    for stage in (Stage.BASELINE, Stage.EVALUATE, Stage.FINISHED):
        assert budget.refusal(round_of(4, stage, noise=0)) == ""
    assert budget.store.read().updates == 1


@pytest.mark.parametrize("damaged", [False, True])
def test_after_an_update_without_noise_or_a_damaged_record_no_limit_holds(tmp_path: Path, damaged: bool) -> None:
    store = BudgetStore(tmp_path)
    if damaged:
        store.path.write_text('{"mu_squared": ')
    else:
        PrivacyBudget(store).record(round_of(1, noise=0))
    assert PrivacyBudget(store).refusal(round_of(2)) == ""
    reason = PrivacyBudget(store, limit=1000.0).refusal(round_of(2))
    why = "the record of its updates was damaged" if damaged else "it has sent updates without noise"
    assert reason == f"its --max-epsilon 1000 is passed: {why}; delete STATE/privacy to count from now on"
    plain = "none was asked for: the runs of this device had no noise (--dp-noise of the server)"
    assert describe_budget(store.read()) == (f"no ε holds: {why}" if damaged else plain)
    PrivacyBudget(store).record(round_of(3))
    assert describe_budget(store.read()) == f"no ε holds: {why}"
    assert epsilon_of(store.read()) is None
    store.path.unlink()
    assert PrivacyBudget(store, limit=1000.0).refusal(round_of(2)) == ""
    assert describe_budget(store.read()) == ""


class Killed(BaseException):
    pass


@pytest.fixture
def daemon(vit: Built, photos: Path, tmp_path: Path) -> InProcessDaemon:
    return make_daemon(vit, photos, tmp_path)


@pytest.mark.parametrize("where", ["before the record", "after the record", "before the outbox", "after the outbox"])
def test_a_device_killed_around_its_record_never_counts_less_than_what_left(
    daemon: InProcessDaemon, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Only what is in the outbox is ever sent."""
    owner, name = (BudgetStore, "write") if "record" in where else (Outbox, "write")
    write, store = getattr(owner, name), daemon.device.store

    def interrupted(*arguments: object) -> None:
        if where.startswith("after"):
            write(*arguments)
        raise Killed

    asked = announced_round(Stage.STATISTICS, level=1, encoding=Encoding.FP32, privacy=PRIVACY)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, name, interrupted)
        daemon.runner.run(asked, bytes_down=0)
    left = store.outbox.read(asked.round) is not None
    assert left == (where == "after the outbox")
    assert store.budget.read().updates == (0 if where == "before the record" else 1)
    daemon.runner.run(asked, bytes_down=0)
    assert store.budget.read() == Spent(mu_squared=1.0, updates=1, session=asked.session, round=asked.round, cost=1.0)


def test_a_server_that_comes_back_to_a_session_gets_nothing_twice_for_the_price_of_one(daemon: InProcessDaemon) -> None:
    """A second noised update of one round counts again, and a second mask would have the keys of the first."""
    asked = announced_round(Stage.STATISTICS, level=1, encoding=Encoding.FP32, privacy=PRIVACY)
    elsewhere = announced_round(Stage.KEYS, level=1, session="other", secure=True)
    store = daemon.device.store
    store.secure.write(SecureRecord(session=asked.session, keys_round=1, seed="0" * 64))
    daemon.runner.run(asked, bytes_down=0)
    daemon.runner.run(elsewhere, bytes_down=0)
    daemon.runner.run(asked, bytes_down=0)
    assert store.budget.read().updates == 2
    assert store.secure.read() is None


@pytest.mark.parametrize("stage", [Stage.BASELINE, Stage.EVALUATE])
def test_a_device_with_a_limit_sends_no_accuracies_and_no_counts(daemon: InProcessDaemon, stage: Stage) -> None:
    daemon.runner.budget = replace(daemon.runner.budget, limit=8.0)
    store, published = daemon.device.store, initial_globals(daemon.device.bundle, 1)
    layout = daemon.device.bundle.expert
    named = {
        "expert": layout.split(published.expert),
        "start": layout.split(published.start),
        "gate": daemon.device.bundle.gate.split(published.gate),
    }
    blobs = {kind: pack(Globals(run="r", kind=kind), tensors) for kind, tensors in named.items()}
    for blob in blobs.values():
        store.globals.write(blob)
    asked = announced_round(stage, **{kind: blob_hash(blob) for kind, blob in blobs.items()})
    daemon.runner.run(asked, bytes_down=0)
    update, tensors = unpack(store.outbox.read(asked.round) or b"", Update)
    assert (tensors, update.metrics, update.counts, update.samples) == ({}, {}, {}, 0)
    assert (store.results if stage is Stage.EVALUATE else store.baseline).is_file()  # for its owner
