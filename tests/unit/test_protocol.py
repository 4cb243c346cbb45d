"""The contract: layouts, blobs, chunks, messages, bundles on disk, PEFT's names, the head of class means."""

from __future__ import annotations

import json
import shutil
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.bundles import Built, random_theta

from fedfmsl.algorithms.arrays import Vector
from fedfmsl.algorithms.class_means import SCALE, class_mean_head
from fedfmsl.algorithms.privacy import Privacy
from fedfmsl.algorithms.sal import CapabilityQueue, Sal
from fedfmsl.common.cli import console
from fedfmsl.errors import LINE, BundleError, ConfigError, FedFMSLError, MessageError
from fedfmsl.protocol.bundle import MAX_MANIFEST_BYTES, Bundle
from fedfmsl.protocol.chunks import CHUNK_BYTES, MAX_BLOB_BYTES, Assembler, chunks
from fedfmsl.protocol.layout import Layout, Slot
from fedfmsl.protocol.messages import (
    Ack,
    DeviceStatus,
    Progress,
    Round,
    ServerStatus,
    Stage,
    Training,
    Update,
    Verdict,
    encode,
    parse,
)
from fedfmsl.protocol.peft_names import from_peft, to_peft
from fedfmsl.protocol.tensors import MAX_HEADER_BYTES, MAX_TENSORS, pack, unpack
from fedfmsl.protocol.topics import Topics

SHAPES = st.lists(st.integers(1, 4), max_size=3).map(tuple)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    shapes = draw(st.lists(SHAPES, min_size=1, max_size=6))
    return Layout.build([(str(i // 2), f"t{i}", shape) for i, shape in enumerate(shapes)])


def vector_of(layout: Layout, seed: int) -> Vector:
    return np.random.default_rng(seed).normal(size=layout.total).astype(np.float32)


UPDATE = Update(
    run="r", session="s", round=3, device="d", stage=Stage.GLOBAL, level=1, samples=5, metrics={"loss": 0.5}
)


ROUND = Round(
    run="r",
    session="s",
    round=3,
    stage=Stage.GLOBAL,
    index=0,
    of=1,
    level=1,
    training=Training(epochs=1, learning_rate=1e-3),
    sal=Sal(CapabilityQueue(2, 0), max_level=3),
    privacy=Privacy(clip=1.0, noise_multiplier=0.5, shares=4),
)


# layout


@given(layouts(), st.integers(0, 9), st.data())
def test_joining_what_was_split_gives_the_vector_back(layout: Layout, seed: int, data: st.DataObject) -> None:
    vector = vector_of(layout, seed)
    end = data.draw(st.sampled_from([slot.end for slot in layout.slots]))
    tensors = layout.split(vector[:end])
    shuffled = dict(data.draw(st.permutations(list(tensors.items()))))
    assert np.array_equal(layout.join(shuffled), vector[:end])
    assert layout.join({}).size == 0


@given(layouts(), st.integers(0, 9), st.data())
def test_join_refuses_whatever_is_not_the_first_slots_in_shape_and_finite(
    layout: Layout, seed: int, data: st.DataObject
) -> None:
    tensors: dict[str, NDArray[Any]] = dict(layout.split(vector_of(layout, seed)))
    name = data.draw(st.sampled_from(list(tensors)))
    wrong = {
        "dtype": tensors[name].astype(np.float64),
        "shape": tensors[name][np.newaxis],
        "nan": np.full_like(tensors[name], np.nan),
        "infinite": np.full_like(tensors[name], -np.inf),
    }
    with pytest.raises(MessageError, match=name):
        layout.join({**tensors, name: wrong[data.draw(st.sampled_from(list(wrong)))]})
    with pytest.raises(MessageError):
        layout.join({**tensors, "more": tensors[name]})
    if name != layout.slots[-1].name:
        with pytest.raises(MessageError):
            layout.join({key: tensor for key, tensor in tensors.items() if key != name})


def test_a_layout_with_a_gap_is_refused() -> None:
    with pytest.raises(ValueError, match="starts at 3, expected 2"):
        Layout([Slot(name="a", shape=(2,), offset=0, part="p"), Slot(name="b", shape=(1,), offset=3, part="p")])


def test_a_higher_level_only_appends_from_the_head_towards_the_input(vit: Built) -> None:
    layout, levels = vit.bundle.expert, range(vit.bundle.manifest.levels + 1)
    assert list(layout.parts) == ["head", "2", "1", "0"]
    for level in levels:
        assert layout.names(level) == list(layout.split(np.zeros(layout.size(level), np.float32)))
    assert [len(layout.names(level)) for level in levels] == [2, 6, 10, 14]


# blobs and chunks


@given(layouts(), st.integers(0, 9))
def test_unpacking_what_was_packed_gives_header_and_tensors_back(layout: Layout, seed: int) -> None:
    tensors = layout.split(vector_of(layout, seed))
    header, found = unpack(pack(UPDATE, tensors), Update)
    assert header == UPDATE
    assert found.keys() == tensors.keys()
    assert all(np.array_equal(found[name], tensors[name]) for name in tensors)


def test_a_view_that_is_not_contiguous_is_packed_as_it_reads() -> None:
    tensor = np.arange(12, dtype=np.float32).reshape(3, 4)
    _, found = unpack(pack(UPDATE, {"t": tensor.T, "s": tensor[:, ::2]}), Update)
    assert np.array_equal(found["t"], tensor.T)
    assert np.array_equal(found["s"], tensor[:, ::2])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
TENSOR = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "F8_E4M3", "BOOL", "F4", "U64", "C64", "?"]),
        "shape": st.lists(st.integers(-1, 2**70), max_size=2),
        "data_offsets": st.lists(st.integers(0, 16), max_size=3),
    },
)
METADATA = st.fixed_dictionaries({}, optional={"header": st.just(UPDATE.model_dump_json()) | st.text(max_size=9)})
SAFETENSORS_LIKE = st.builds(
    lambda header, body: struct.pack("<Q", len(header)) + header + body,
    st.one_of(
        st.binary(max_size=40),
        JSON.map(lambda value: json.dumps(value).encode()),
        st.dictionaries(st.sampled_from(["a", "b"]), TENSOR | JSON, max_size=2).flatmap(
            lambda tensors: METADATA.map(lambda meta: json.dumps({"__metadata__": meta, **tensors}).encode())
        ),
    ),
    st.binary(max_size=16),
)


@settings(max_examples=2000)
@given(st.binary(max_size=300) | SAFETENSORS_LIKE)
def test_unpacking_any_bytes_raises_nothing_but_a_message_error(blob: bytes) -> None:
    try:
        header, _ = unpack(blob, Update)
    except MessageError:
        return
    assert header == UPDATE


@settings(max_examples=1000)
@given(st.data())
def test_a_blob_with_some_bytes_changed_is_refused_or_well_formed(data: st.DataObject) -> None:
    blob = bytearray(pack(UPDATE, {"a": np.ones(3, np.float32), "b": np.zeros((2, 2), np.float32)}))
    for _ in range(data.draw(st.integers(1, 3))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    try:
        header, tensors = unpack(bytes(blob[: data.draw(st.integers(0, len(blob)))]), Update)
    except MessageError:
        return
    assert isinstance(header, Update)
    assert all(isinstance(tensor, np.ndarray) for tensor in tensors.values())


def blob_of(tensors: str, body: bytes = b"") -> bytes:
    """A safetensors file with a valid header of ours and these entries of tensors, in JSON."""
    metadata = json.dumps({"header": UPDATE.model_dump_json()})
    text = f'{{"__metadata__":{metadata}{"," if tensors else ""}{tensors}}}'.encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(name: str, dtype: str, shape: str, *offsets: int) -> str:
    return f'"{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{list(offsets)}}}'


HOSTILE = {
    "the same bytes twice": blob_of(f"{entry('a', 'F32', '[1]', 0, 4)},{entry('b', 'F32', '[1]', 0, 4)}", bytes(4)),
    "bytes of no tensor": blob_of(entry("a", "F32", "[1]", 0, 4), bytes(8)),
    "empty and huge": blob_of(entry("a", "F32", f"[0,{2**63}]", 0, 0)),
    "empty and too huge": blob_of(entry("a", "F32", f"[0,{2**64 - 1}]", 0, 0)),
    "product overflows": blob_of(entry("a", "F32", f"[{2**62},{2**62}]", 0, 4), bytes(4)),
    "many dimensions": blob_of(entry("a", "F32", json.dumps([1] * 65), 0, 4), bytes(4)),
    "not finite": blob_of(entry("a", "F32", "[NaN]", 0, 4), bytes(4)),
    "a name twice": blob_of(f"{entry('a', 'F32', '[1]', 0, 4)},{entry('a', 'F32', '[1]', 4, 8)}", bytes(8)),
    "deep": blob_of('"a":' + "[" * 100_000),
    "deep where nobody looks": blob_of(entry("a", "F32", "[0]", 0, 0)[:-1] + ',"x":' + "[" * 9000 + "]" * 9000 + "}"),
    "header of 100 MB": struct.pack("<Q", 10**8) + b"{}",
    "header longer than any": struct.pack("<Q", 2**64 - 1) + b"{}",
    "header above the cap": blob_of(",".join(entry(f"{i}" * 99, "F32", "[0]", 0, 0) for i in range(4000))),
    "too many tensors": blob_of(",".join(entry(f"{i}", "I8", "[0]", 0, 0) for i in range(MAX_TENSORS + 1))),
    **{dtype: blob_of(entry("a", dtype, "[8]", 0, 8 * size), bytes(8 * size)) for dtype, size in
       {"F64": 8, "BF16": 2, "F8_E4M3": 1, "U8": 1, "BOOL": 1, "I64": 8, "C64": 8}.items()},
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_blob_is_refused_in_one_line_without_much_memory(what: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(MessageError) as refused:
            unpack(HOSTILE[what], Update)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < len(HOSTILE[what]) + 16 * 1024 * 1024
    assert len(str(refused.value)) < 500
    assert str(refused.value).isprintable()


def test_a_header_of_nothing_but_brackets_takes_a_bounded_multiple_of_its_length() -> None:
    blob = blob_of(entry("a", "F32", "[0]", 0, 0)[:-1] + ',"x":[' + "{}," * 170_000 + "0]}")
    assert len(blob) < MAX_HEADER_BYTES + 8
    tracemalloc.start()
    try:
        _, tensors = unpack(blob, Update)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert list(tensors) == ["a"]
    assert peak < 32 * MAX_HEADER_BYTES


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8])
def test_the_types_that_values_travel_as_come_through(dtype: type[np.generic]) -> None:
    tensor = np.arange(6).astype(dtype).reshape(2, 3)
    _, found = unpack(pack(UPDATE, {"t": tensor}), Update)
    assert found["t"].dtype == dtype
    assert np.array_equal(found["t"], tensor)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5 * CHUNK_BYTES), st.data())
def test_chunks_add_up_in_any_order_and_with_repeats(size: int, data: st.DataObject) -> None:
    blob = np.random.default_rng(size).bytes(size)
    pieces = list(chunks(blob))
    assert len(pieces) == -(-size // CHUNK_BYTES)
    order = data.draw(st.permutations(range(len(pieces))))
    repeats = data.draw(st.lists(st.sampled_from(order[:-1]), max_size=4)) if len(order) > 1 else []
    assembler = Assembler(MAX_BLOB_BYTES)
    assert all(assembler.add(pieces[index]) is None for index in [*order[:-1], *repeats])
    assert assembler.add(pieces[order[-1]]) == blob


def test_a_blob_that_breaks_off_gives_way_to_the_next() -> None:
    old, new = (np.random.default_rng(seed).bytes(2 * CHUNK_BYTES) for seed in (0, 1))
    assembler = Assembler(MAX_BLOB_BYTES)
    assert assembler.add(next(chunks(old))) is None
    first, second = chunks(new)
    assert assembler.add(second) is None
    assert assembler.add(first) == new


@pytest.mark.parametrize("where", ["body", "magic", "count", "short", "long", "not full", "empty"])
def test_a_corrupt_chunk_is_a_message_error_and_the_blob_can_be_sent_again(where: str) -> None:
    blob = np.random.default_rng(2).bytes(CHUNK_BYTES + 10)
    first, last = chunks(blob)
    bad = {
        "body": last[:-1] + bytes([last[-1] ^ 1]),
        "magic": b"XXXX" + last[4:],
        "count": last[:8] + b"\xff" * 4 + last[12:],
        "short": last[:20],
        "long": first + b"more",
        "not full": first[:-1],
        "empty": last[:-10],
    }[where]
    assembler = Assembler(MAX_BLOB_BYTES)
    assembler.add(first)
    with pytest.raises(MessageError):
        assembler.add(bad)
    assert [assembler.add(chunk) for chunk in (first, last)][-1] == blob


def test_a_blob_above_the_receivers_cap_is_refused_at_its_first_chunk() -> None:
    assembler = Assembler(CHUNK_BYTES + 1)
    fitting, larger = (np.random.default_rng(size).bytes(size) for size in (CHUNK_BYTES + 1, 2 * CHUNK_BYTES + 1))
    with pytest.raises(MessageError, match="not expected"):
        assembler.add(next(chunks(larger)))
    assert [assembler.add(chunk) for chunk in chunks(fitting)][-1] == fitting
    with pytest.raises(MessageError, match="not expected"):
        Assembler(10 * MAX_BLOB_BYTES).add(struct.pack(">4sII32s", b"FMS1", 0, 700, bytes(32)) + bytes(CHUNK_BYTES))


@given(st.binary(max_size=200))
def test_any_bytes_as_a_chunk_raise_nothing_but_a_message_error(chunk: bytes) -> None:
    with pytest.raises(MessageError):
        Assembler(MAX_BLOB_BYTES).add(chunk)


# messages


@settings(max_examples=500)
@given(st.binary(max_size=100) | JSON.map(lambda value: json.dumps(value).encode()))
def test_parsing_junk_raises_nothing_but_a_message_error(payload: bytes) -> None:
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
def test_an_update_with_an_impossible_field_is_refused(change: dict[str, Any]) -> None:
    payload = json.dumps({**UPDATE.model_dump(mode="json"), **change}).encode()
    with pytest.raises(MessageError, match=next(iter(change))):
        parse(Update, payload)


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"-1e999"])
def test_a_number_that_is_not_finite_is_refused(number: bytes) -> None:
    with pytest.raises(MessageError, match="finite"):
        parse(Update, encode(UPDATE).replace(b"0.5", number))


def test_a_round_names_at_most_five_thousand_devices_and_each_by_a_valid_name() -> None:
    asked = ROUND.model_copy(update={"chosen": tuple(f"device-{number}" for number in range(5000))})
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


def test_what_a_stranger_writes_for_people_becomes_one_short_plain_line() -> None:
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
def test_a_payload_that_costs_more_than_it_says_is_refused_cheaply(payload: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(MessageError, match="not a valid Round"):
            parse(Round, payload)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 * 1024 * 1024


def test_messages_survive_the_wire_and_long_ones_are_refused() -> None:
    assert parse(Update, encode(UPDATE)) == UPDATE
    for kind in (ServerStatus, Round, Update):
        with pytest.raises(MessageError, match="more than"):
            parse(kind, b" " * (kind.max_bytes + 1))


@pytest.mark.parametrize("name", ["", "a/b", "+", "#", "-x", "a" * 65, "ü", "a b", "a\n"])
def test_names_that_would_break_a_topic_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="invalid"):
        Topics(name)


def test_the_device_of_a_topic_is_found_only_in_device_topics_of_the_run() -> None:
    topics = Topics("r")
    for topic in (topics.status("d"), topics.ack("d"), topics.update_chunk("d", 1, 0), topics.progress("d")):
        assert topics.device_of(topic) == "d"
    for topic in (topics.round, topics.server_status, topics.globals_chunk("ab", 0), Topics("s").status("d")):
        assert topics.device_of(topic) is None


HOSTILE_TOPICS = [
    "",
    "/",
    "#",
    "fedfmsl",
    "fedfmsl/r/devices",
    "fedfmsl/r/devices//update/1/0",
    "fedfmsl/r/devices/../update/1/0",
    "fedfmsl/r/devices/[/x]/update/1/0",
    "fedfmsl/r/devices/d\n/update/1/0",
    "fedfmsl/r/devices/ü/update/1/0",
    f"fedfmsl/r/devices/{'d' * 65}/update/1/0",
    "fedfmsl/r/globals//0",
    "fedfmsl/r/globals/../0",
    f"fedfmsl/r/globals/{'A' * 64}/0",
    "/" * 65_535,
]


@pytest.mark.parametrize("topic", HOSTILE_TOPICS, ids=range(len(HOSTILE_TOPICS)))
def test_a_hostile_topic_is_nobodys(topic: str) -> None:
    topics = Topics("r")
    assert topics.device_of(topic) is None
    assert topics.update_of(topic) is None
    assert topics.globals_of(topic) is None


@pytest.mark.parametrize(
    "number", ["", "-1", "+1", "01", "1.0", "1e3", "0x1", " 1", "1_0", "²", "١", "2147483649", "9" * 5000]
)
def test_an_update_is_of_a_round_that_is_a_plain_number(number: str) -> None:
    topics = Topics("r")
    assert topics.update_of(topics.update_chunk("d", 2**31, 7)) == ("d", 2**31)
    assert topics.update_of(topics.update_chunk("d", number, 0)) is None
    assert topics.update_of(topics.update_chunk("d", 0, number)) is None


def test_what_a_stranger_has_written_is_printed_and_not_read_as_markup(capsys: pytest.CaptureFixture[str]) -> None:
    console.print("dropped [/x] [red]of[/red] :smile:")
    assert capsys.readouterr().out == "dropped [/x] [red]of[/red] :smile:\n"


# bundles on disk


@pytest.mark.parametrize("damage", ["changed", "shortened", "missing"])
def test_verify_names_the_file_that_is_not_as_it_was_built(vit: Built, tmp_path: Path, damage: str) -> None:
    vit.bundle.verify()
    root = shutil.copytree(vit.bundle.root, tmp_path / "copy")
    for name in vit.bundle.manifest.files:
        path, data = root / name, (root / name).read_bytes()
        path.unlink()
        if damage != "missing":
            path.write_bytes(data[:-1] + (bytes([data[-1] ^ 1]) if damage == "changed" else b""))
        with pytest.raises(BundleError, match=name):
            Bundle.load(root).verify()
        path.write_bytes(data)
    Bundle.load(root).verify()


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\xff", b'{"schema_version": 1}'])
def test_a_folder_without_a_manifest_of_this_schema_is_no_bundle(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(BundleError, match=r"export\.build"):
        Bundle.load(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"files": {"../secret": {"size": 1, "sha256": "0" * 64}}},
        {"files": {"a\0b": {"size": 1, "sha256": "0" * 64}}},
        {"files": {"": {"size": 1, "sha256": "0" * 64}}},
        {"files": {"a": {"size": -1, "sha256": "0" * 64}}},
        {"files": {"a": {"size": 1, "sha256": "../x"}}},
        {"levels": 2},
        {"gate_layout": []},
        {"expert_layout": []},
        {"backbone_parameters": 0},
        {"model": "m" * MAX_MANIFEST_BYTES},
    ],
    ids=lambda change: str(change)[:40],
)
def test_a_manifest_that_does_not_hold_together_is_refused(vit: Built, tmp_path: Path, change: dict[str, Any]) -> None:
    manifest = vit.bundle.manifest.model_dump(mode="json")
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, **change}))
    with pytest.raises(BundleError, match=r"export\.build"):
        Bundle.load(tmp_path)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd"])
def test_a_manifest_cannot_name_files_outside_the_bundle(vit: Built, name: str) -> None:
    with pytest.raises(BundleError, match="outside the bundle"):
        vit.bundle.path(name)


def test_the_features_key_follows_weights_and_preprocessing(vit: Built, dinov2: Built, tmp_path: Path) -> None:
    root = shutil.copytree(vit.bundle.root, tmp_path / "copy")
    manifest = (root / "manifest.json").read_text()
    assert Bundle.load(root).features_key == vit.bundle.features_key != dinov2.bundle.features_key
    (root / "manifest.json").write_text(manifest.replace('"mean": [\n   0.5', '"mean": [\n   0.25'))
    assert Bundle.load(root).features_key != vit.bundle.features_key


def test_every_error_has_an_exit_code_of_its_own() -> None:
    kinds: list[type[FedFMSLError]] = [FedFMSLError, *FedFMSLError.__subclasses__()]
    assert len({kind.exit_code for kind in kinds}) == len(kinds)


# PEFT's names and the head


def test_trainables_survive_pefts_names_and_the_wider_classifier(built: Built) -> None:
    bundle, spec = built.bundle, built.bundle.manifest.peft
    theta = random_theta(bundle, bundle.manifest.levels, 0)
    renamed = to_peft(spec, bundle.expert.split(theta))
    assert all(name.startswith("base_model.model.") for name in renamed)
    assert renamed["base_model.model.classifier.weight"].shape == (4, spec.classifier_width)
    assert np.array_equal(bundle.expert.join(from_peft(spec, renamed)), theta)


@settings(max_examples=50)
@given(st.integers(2, 5), st.integers(2, 6), st.integers(0, 99))
def test_the_first_head_points_along_the_class_means_and_scores_about_scaled_cosines(
    classes: int, width: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    features = rng.normal(1, 1, (40, width)).astype(np.float32)
    labels = rng.integers(0, classes - 1, 40)  # nobody has the last class
    one_hot = np.eye(classes)[labels]
    norms = np.linalg.norm(features, axis=1)
    head = class_mean_head(
        (one_hot.T @ features).astype(np.float32), one_hot.sum(axis=0).astype(np.float32), float(norms.sum())
    )
    weight, bias = head[: classes * width].reshape(classes, width), head[classes * width :]
    assert head.dtype == np.float32
    assert not bias.any()
    assert not weight[-1].any()
    for label in set(labels.tolist()):
        mean = features[labels == label].mean(axis=0)
        assert np.allclose(weight[label], SCALE * mean / np.linalg.norm(mean) / norms.mean(), rtol=1e-4, atol=1e-4)
