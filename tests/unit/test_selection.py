"""Whom an announcement selects: the server's set and what each device computes from the announcement are the same."""

from __future__ import annotations

import pytest
from support.bundles import Built
from support.coordinators import ROUND_SECONDS, CoordinatorRun, plan_for
from support.wire import ROUND

from fedfmsl.algorithms.draw import TICKET_BITS, Draw, lowest, ticket
from fedfmsl.protocol.messages import MAX_NAMED, Round, Stage, encode
from trainer_server.config import RunConfig, Selection
from trainer_server.coordinator.events import StatusSeen
from trainer_server.coordinator.selection import FEW, announced_as, at_most

NAMES = tuple(f"device-{number:05}" for number in range(4000))


def asked(round_: Round) -> frozenset[str]:
    return frozenset(name for name in NAMES if round_.asks(name))


def announced(selected: frozenset[str], ready: frozenset[str], excluded: frozenset[str], seed: int = 1) -> Round:
    fields = announced_as(selected, ready, excluded, seed, 7)
    return ROUND.model_copy(update={"round": 7, "chosen": (), **fields})


def test_tickets_are_uniform_and_new_in_each_round() -> None:
    tickets = [ticket(0, 1, name) / (1 << TICKET_BITS) for name in NAMES]
    assert len(set(tickets)) == len(NAMES)
    for share in (0.1, 0.5, 0.9):
        assert abs(sum(each < share for each in tickets) / len(NAMES) - share) < 0.03
    first, second = (set(lowest(NAMES, 400, 0, round_)) for round_ in (1, 2))
    assert 10 < len(first & second) < 90  # 40 are expected
    assert set(lowest(reversed(NAMES), 400, 0, 1)) == first


@pytest.mark.parametrize(
    "selected",
    [
        frozenset(NAMES),
        frozenset(NAMES[3:]),
        frozenset(NAMES[:FEW]),
        frozenset(lowest(NAMES, 1000, 1, 7)),
        frozenset(lowest(NAMES[50:], 1000, 1, 7)),
        frozenset(NAMES[:1000]),
    ],
    ids=["all", "all but three", "few", "a draw", "a draw without some", "no draw"],
)
def test_devices_compute_the_set_that_the_server_selected(selected: frozenset[str]) -> None:
    ready = frozenset(NAMES)
    round_ = announced(selected, ready, frozenset())
    assert asked(round_) == selected
    assert (len(encode(round_)) < 8000) or len(round_.chosen) == 1000


def test_no_form_asks_a_device_that_the_operator_has_excluded() -> None:
    ready, gone = frozenset(NAMES[10:]), frozenset(NAMES[:10])
    for selected in (ready, frozenset(lowest(ready, 1000, 1, 7)), frozenset(NAMES[10:20])):
        round_ = announced(selected, ready, gone)
        assert asked(round_) == selected and round_.selects


def test_a_selection_that_can_only_be_named_is_cut_to_what_an_announcement_holds() -> None:
    half = frozenset(NAMES[:3000])
    cut = at_most(half, NAMES, (), 1, 7)
    assert len(cut) == MAX_NAMED and cut < half
    assert asked(announced(cut, frozenset(NAMES), frozenset())) == cut
    assert at_most(frozenset(NAMES[5:]), NAMES, (), 1, 7) == frozenset(NAMES[5:])
    many = frozenset(NAMES[: FEW + 1])  # excluded
    rest = frozenset(NAMES) - many
    cut = at_most(rest, rest, many, 1, 7)
    assert len(cut) == MAX_NAMED and asked(announced(cut, rest, many)) == cut


def test_a_bound_that_is_no_ticket_is_refused() -> None:
    with pytest.raises(ValueError, match="below"):
        Draw(0, 1 << TICKET_BITS)


def test_a_run_of_many_devices_draws_its_rounds_and_names_a_part_for_secure_sums(vit: Built) -> None:
    plan = plan_for(
        vit, len(NAMES), select=Selection.RANDOM, fraction=0.5, secure_sums=True, min_updates=1, stage1_rounds=1
    )
    run = CoordinatorRun(plan)
    run.feed(*(StatusSeen(run.status(name)) for name in NAMES))
    assert run.announced.stage is Stage.KEYS and len(run.announced.chosen) == MAX_NAMED
    while run.announced.stage is not Stage.GLOBAL:  # nobody answers, so the run goes on without the sums
        run.now += ROUND_SECONDS
        run.feed()
    assert run.announced.draw and not run.announced.chosen
    assert asked(run.announced) == run.state.expected and len(run.state.expected) == 2000


def test_a_run_that_knows_many_devices_forgets_those_that_are_offline(vit: Built) -> None:
    run = CoordinatorRun(plan_for(vit, 2))
    most = run.plan.config.most_devices
    run.feed(*(StatusSeen(run.status(name)) for name in NAMES[:most]))
    run.feed(StatusSeen(run.status(NAMES[most])))
    assert NAMES[most] not in run.state.devices  # all others are online
    gone = NAMES[:100]
    run.feed(*(StatusSeen(run.status(name).model_copy(update={"online": False})) for name in gone))
    for _ in range(2):  # no device answers; the second round does not expect them
        run.now += ROUND_SECONDS
        run.feed()
    run.feed(StatusSeen(run.status(NAMES[most])))
    assert NAMES[most] in run.state.devices and not run.state.devices.keys() & {*gone}


def test_secure_aggregation_of_more_devices_than_an_announcement_names_is_refused(vit: Built) -> None:
    with pytest.raises(ValueError, match=r"at most 2500 devices.*--fraction 0.25"):
        plan_for(vit, 10_000, secure=True)
    assert isinstance(
        plan_for(vit, 10_000, secure=True, select=Selection.RANDOM, fraction=0.25, stage2_rounds=1).config, RunConfig
    )
