"""Messages: bounds of all fields, and hostile payloads."""

from __future__ import annotations

import json
import sys
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.wire import JSON, ROUND, UPDATE

from fedfmsl.errors import LINE, MessageError
from fedfmsl.protocol.messages import (
    Ack,
    DeviceStatus,
    Progress,
    Round,
    ServerStatus,
    Stage,
    Update,
    Verdict,
    compact,
    encode,
    parse,
)


@settings(max_examples=500)
@given(st.binary(max_size=100) | JSON.map(lambda value: json.dumps(value).encode()))
def test_parsing_any_bytes_raises_only_message_errors(payload: bytes) -> None:
    for kind in (Round, Update, DeviceStatus, Progress):
        with pytest.raises(MessageError, match=kind.__name__):
            parse(kind, payload)


@pytest.mark.parametrize(
    "change",
    [
        {"samples": -1},
        {"samples": 10**400},
        {"level": -1},
        {"stage": "dessert"},
        {"metrics": {"loss": "much"}},
        {"seconds": -1.0},
        {"surprise": 1},
        {"round": -1},
        {"round": 2**31 + 1},
        {"level": 1025},
        {"device": "a/b"},
        {"device": "d\n"},
        {"run": "x" * 65},
        {"session": ""},
        {"session": "s" * 65},
        {"session": "../s"},
        {"engine": "e" * 33},
        {"metrics": {f"m{i}": 0.0 for i in range(65)}},
        {"metrics": {"a b": 0.0}},
        {"counts": {f"c{i}": [1] for i in range(17)}},
        {"counts": {"test": [1] * 4097}},
        {"counts": {"test": [-1]}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_an_update_with_an_invalid_field_is_refused(change: dict[str, Any]) -> None:
    payload = json.dumps({**UPDATE.model_dump(mode="json"), **change}).encode()
    with pytest.raises(MessageError, match=next(iter(change))):
        parse(Update, payload)


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"-1e999"])
def test_a_number_that_is_not_finite_is_refused(number: bytes) -> None:
    with pytest.raises(MessageError, match="finite"):
        parse(Update, encode(UPDATE).replace(b"0.5", number))


def test_a_head_round_with_privacy_is_refused() -> None:
    head = ROUND.model_copy(update={"stage": Stage.HEAD})
    assert ROUND.privacy is not None
    with pytest.raises(MessageError, match="no stage head"):
        parse(Round, encode(head))
    without = head.model_copy(update={"privacy": None})
    assert parse(Round, encode(without)) == without


def test_a_round_has_at_most_2500_devices_with_valid_names() -> None:
    asked = ROUND.model_copy(update={"chosen": tuple(f"device-{number}" for number in range(2500))})
    assert parse(Round, encode(asked)) == asked
    for chosen in ((*asked.chosen, "one-more"), ("a/b",), ("",)):
        with pytest.raises(MessageError, match="chosen"):
            parse(Round, encode(ROUND.model_copy(update={"chosen": chosen})))


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("training", {"epochs": 0}),
        ("training", {"learning_rate": 0}),
        ("sal", {"max_level": 2000}),
        ("sal", {"color": "red"}),
        ("sal", {"trigger": {"kind": "capability-queue", "window": 1}}),
        ("sal", {"trigger": {"kind": "fixed-schedule", "min_gain": 0.1}}),
        ("sal", {"trigger": {"kind": "sometimes"}}),
        ("privacy", {"clip": 0}),
        ("privacy", {"noise_multiplier": "Infinity"}),
        ("privacy", {"shares": 2**40}),
    ],
)
def test_the_settings_of_a_round_have_bounds_and_no_unknown_fields(field: str, changes: dict[str, Any]) -> None:
    announced = json.loads(encode(ROUND))
    announced[field].update(changes)
    with pytest.raises(MessageError, match=f"{field}.*{next(iter(changes))}"):
        parse(Round, json.dumps(announced).encode())


@pytest.mark.parametrize(
    "names", [["../fig"], ["fig\n"], [" "], ["Unknown"], ["e\u0301"], ["f" * 256], [f"c{i}" for i in range(17)]]
)
def test_a_device_proposes_at_most_sixteen_classes_with_valid_names(names: list[str]) -> None:
    payload = json.dumps({"device": "d", "online": True, "proposed": dict.fromkeys(names, 1)}).encode()
    with pytest.raises(MessageError, match="proposed"):
        parse(DeviceStatus, payload)


def test_untrusted_text_becomes_one_short_printable_line() -> None:
    hostile = "a\n\x1b[31mb\u202e" + "c" * 9000
    ack = Ack(run="r", session="s", round=1, device="d", verdict=Verdict.REJECTED, reason=hostile)
    assert ack.reason.startswith("a ?[31mb?ccc")
    assert len(ack.reason) == LINE
    with pytest.raises(MessageError) as refused:
        parse(Update, json.dumps({**UPDATE.model_dump(mode="json"), hostile: 1}).encode())
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 2 * LINE


@pytest.mark.parametrize(
    "payload",
    [
        b"[" * 60_000,
        b'{"round":' + b"9" * 60_000 + b"}",
        b'{"run":"\xff"}',
        b'{"run":"\\ud800"}',
        b"{" + b",".join(b'"%d":0' % number for number in range(6000)) + b"}",
        b'{"chosen":[' + b'"",' * 15_000 + b'""]}',
    ],
    ids=["deep", "huge number", "not UTF-8", "half a surrogate", "many fields", "many names"],
)
def test_a_payload_that_is_costly_to_parse_is_refused_with_little_memory(payload: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(MessageError, match="not a valid Round"):
            parse(Round, payload)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 * 1024 * 1024


def test_parse_is_the_inverse_of_encode_and_long_payloads_are_refused() -> None:
    assert parse(Update, encode(UPDATE)) == UPDATE
    for kind in (ServerStatus, Round, Update):
        with pytest.raises(MessageError, match="more than"):
            parse(kind, b" " * (kind.max_bytes + 1))


def test_compact_messages_are_equal_and_share_what_they_have_in_common() -> None:
    changes: list[dict[str, Any]] = [{"device": "a"}, {"device": "b", "samples": 7}, {"device": "c", "metrics": {}}]
    updates = [UPDATE.model_copy(update={"session": "s" * 64, **change}) for change in changes]
    kept = [compact(parse(Update, encode(update))) for update in updates]
    assert kept == updates and [*map(encode, kept)] == [*map(encode, updates)]
    assert kept[0].session is kept[2].session and kept[0].metrics is kept[1].metrics
    assert kept[2].model_copy(update={"level": 2}).level == 2 and kept[2].level == 1
    assert sys.getsizeof(vars(kept[0])) < 0.6 * sys.getsizeof(vars(updates[0]))
