"""The feature cache: its states equal those of a direct run, and are never stale."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from support.bundles import LAYERS, Built, Floats, random_theta, relative_error, run_graph
from support.opened_files import opened_below
from support.samples import CLASSES, set_dates
from support.torch_reference import hidden_states, torch_expert

from edge_runtime.data import features, inputs
from edge_runtime.data.cache import DiskCache
from edge_runtime.data.features import FeatureCache, Features, HiddenStates
from edge_runtime.data.folder import SampleFolder, scan_once
from edge_runtime.data.inputs import IMAGES, TEXTS, reader_of
from edge_runtime.data.sample_reader import SampleReader
from edge_runtime.data.samples import Sample, SampleChangedError
from edge_runtime.engines.sessions import InferenceSession, run
from edge_runtime.store import DeviceStore
from export.reference import torch_inputs
from simulation.store import FileStore

Samples = tuple[Sample, ...]


@pytest.fixture(scope="module")
def images(photos: Path) -> Samples:
    """More than a batch, and not a multiple of one."""
    return scan_once(photos, CLASSES, IMAGES).train[:11]


@pytest.fixture
def samples(built: Built, photos: Path, texts: Path) -> Samples:
    """The same, of the kind that the bundle takes."""
    kind = reader_of(built.bundle).kind
    return scan_once(texts if kind is TEXTS else photos, CLASSES, kind).train[:11]


def inputs_of(built: Built, samples: Samples) -> dict[str, np.ndarray]:
    return reader_of(built.bundle).batch([sample.path for sample in samples])


def whole(cache_states: HiddenStates) -> Floats:
    return cache_states.batch(range(len(cache_states)))


class Memory:
    """Counts how often a cache frees memory, which it does before it opens a graph."""

    def __init__(self) -> None:
        self.freed = 0
        self.is_forbidden = False

    def free(self) -> None:
        assert not self.is_forbidden, "a graph is run again"
        self.freed += 1

    def forbid(self) -> None:
        self.is_forbidden = True


@pytest.fixture
def memory() -> Memory:
    return Memory()


@pytest.mark.parametrize("level", [1, 2, LAYERS])
def test_cached_states_equal_a_direct_run_and_are_computed_once(
    built: Built, samples: Samples, tmp_path: Path, memory: Memory, level: int
) -> None:
    cache = FeatureCache(DiskCache(tmp_path), built.bundle, threads=1, free_memory=memory.free)
    direct, pooled = run_graph(
        built.bundle, "features.onnx", [f"hidden_{level}", "pooled"], **inputs_of(built, samples)
    )
    first = whole(cache.frozen(samples, level))
    assert relative_error(first, direct) < 1e-3
    assert first.dtype == np.float32
    memory.forbid()
    again = FeatureCache(DiskCache(tmp_path), built.bundle, threads=1, free_memory=memory.free)
    assert np.array_equal(whole(again.frozen(samples, level)), first)
    assert np.array_equal(np.concatenate(list(again.frozen(samples, level).batches())), first)
    for other in range(1, LAYERS + 1):
        again.frozen(samples, other)  # the states of all levels came from the same pass
    assert relative_error(again.pooled(samples, level), pooled) < 1e-5


def test_a_pass_stores_the_next_levels_and_a_later_one_only_what_is_missing(
    vit: Built, images: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[list[str]] = []

    def recorded(session: InferenceSession, outputs: list[str], inputs: dict[str, np.ndarray]) -> list[Floats]:
        computed.append(outputs)
        return run(session, outputs, inputs)

    monkeypatch.setattr(features, "run", recorded)
    cache = FeatureCache(DiskCache(tmp_path), vit.bundle, threads=1, batch_size=len(images), ahead=1)
    cache.frozen(images, 1)
    cache.frozen(images, 2)  # from the same pass
    cache.pooled(images, 2)
    higher = whole(cache.frozen(images, LAYERS))
    assert computed == [["hidden_2", "hidden_1", "pooled"], ["hidden_3", "pooled"]]
    assert (
        relative_error(higher, run_graph(vit.bundle, "features.onnx", ["hidden_3"], **inputs_of(vit, images))[0]) < 1e-3
    )


def test_only_missing_images_are_computed(vit: Built, photos: Path, images: Samples, tmp_path: Path) -> None:
    cache = FeatureCache(DiskCache(tmp_path), vit.bundle, threads=1)
    cache.frozen(images[:6], 1)
    with opened_below(photos) as loaded:
        cache.frozen(images, 1)
    assert loaded == [image.path.name for image in images[6:]]


def test_precise_states_are_bitwise_those_of_the_graph(vit: Built, images: Samples, tmp_path: Path) -> None:
    cache = FeatureCache(DiskCache(tmp_path), vit.bundle, threads=1)
    rough = whole(cache.frozen(images, 1))
    exact = whole(cache.precise().frozen(images, 1))
    (direct,) = run_graph(vit.bundle, "features.onnx", ["hidden_1"], **inputs_of(vit, images))
    assert relative_error(exact, direct) < 1e-6
    assert not np.array_equal(rough, exact)


@pytest.mark.parametrize("to_level", [1, 2])
def test_lifted_states_equal_torch_with_peft_below_the_level(
    built: Built, samples: Samples, tmp_path: Path, to_level: int
) -> None:
    cache = FeatureCache(DiskCache(tmp_path), built.bundle, threads=1, dtype=np.float32)
    theta = random_theta(built.bundle, LAYERS, 3)
    states = whole(cache.lifted(samples, LAYERS, to_level, theta))
    with torch_expert(built, theta) as model:
        (values,) = inputs_of(built, samples).values()
        hidden = hidden_states(model, torch_inputs(values, built.bundle.manifest.preprocessing))
    assert relative_error(states, hidden[LAYERS - to_level]) < 1e-5


def test_lifted_states_lead_to_the_same_logits_as_the_whole_expert(
    built: Built, samples: Samples, tmp_path: Path
) -> None:
    bundle = built.bundle
    cache = FeatureCache(DiskCache(tmp_path), bundle, threads=1, dtype=np.float32)
    theta = random_theta(bundle, LAYERS, 4)
    logits = [
        run_graph(
            bundle,
            f"predict-{level}.onnx",
            ["logits"],
            hidden=whole(cache.lifted(samples, LAYERS, level, theta)),
            theta=theta[: bundle.expert.size(level)],
        )[0]
        for level in (1, 2, LAYERS)
    ]
    assert relative_error(logits[0], logits[2]) < 1e-5
    assert relative_error(logits[1], logits[2]) < 1e-5


def test_lifted_states_depend_on_the_lora_of_their_prefix_only(
    vit: Built, images: Samples, tmp_path: Path, memory: Memory
) -> None:
    cache = FeatureCache(DiskCache(tmp_path), vit.bundle, threads=1, free_memory=memory.free)
    theta, part = random_theta(vit.bundle, LAYERS, 5), vit.bundle.expert.parts["0"]
    other, same = theta.copy(), theta.copy()
    other[part] += 0.1
    same[: part.start] += 0.1  # head and upper blocks
    one, two = cache.lifted(images, LAYERS, 2, theta), cache.lifted(images, LAYERS, 2, other)
    assert one.folder != two.folder
    assert not np.array_equal(whole(one), whole(two))
    frozen = cache.frozen(images, 2)
    memory.forbid()
    assert cache.lifted(images, LAYERS, 2, same).folder == one.folder
    assert cache.lifted(images, 2, 2, theta[: vit.bundle.expert.size(2)]).folder == frozen.folder


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda stored: b"",
    "cut off": lambda stored: stored[:-100],
    "of zeros": lambda stored: bytes(len(stored)),  # a power cut can leave a file its length without its content
    "one bit off": lambda stored: bytes([stored[0] ^ 1]) + stored[1:],
    "of its checksum one bit off": lambda stored: stored[:-1] + bytes([stored[-1] ^ 128]),
    "longer": lambda stored: stored + b"more",
}


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_computed_again(
    vit: Built,
    images: Samples,
    tmp_path: Path,
    memory: Memory,
    damage: Callable[[bytes], bytes],
    restarted: bool,
) -> None:
    theta = random_theta(vit.bundle, LAYERS, 6)

    def everything(cache: FeatureCache) -> list[Floats]:
        lifted = whole(cache.lifted(images, LAYERS, 2, theta))
        return [whole(cache.frozen(images, 1)), lifted, cache.pooled(images, 1)]

    cache = FeatureCache(DiskCache(tmp_path), vit.bundle, threads=1, free_memory=memory.free)
    before = everything(cache)
    for folder in tmp_path.iterdir():
        path = folder / images[2].sha256
        path.write_bytes(damage(path.read_bytes()))
    cache = FeatureCache(DiskCache(tmp_path), vit.bundle, threads=1, free_memory=memory.free) if restarted else cache
    for old, new in zip(before, everything(cache), strict=True):
        assert np.allclose(old, new, atol=2e-3)
    memory.forbid()  # and it was stored again
    everything(cache)


def test_damaged_features_of_a_store_that_notices_damage_only_when_it_reads_are_computed_again(
    vit: Built, images: Samples, tmp_path: Path
) -> None:
    def pooled() -> Floats:
        store = FileStore(tmp_path, [image.sha256 for image in images])
        return Features(store, vit.bundle, threads=1).pooled(images, 1)

    before = pooled()
    (path,) = tmp_path.rglob("*-pooled")
    stored = path.read_bytes()
    path.write_bytes(bytes([stored[0] ^ 1]) + stored[1:])
    assert np.allclose(pooled(), before, atol=1e-6)


def test_states_of_another_bundle_are_never_used(vit: Built, dinov2: Built, images: Samples, tmp_path: Path) -> None:
    one = FeatureCache(DiskCache(tmp_path), vit.bundle, threads=1).frozen(images, 1)
    two = FeatureCache(DiskCache(tmp_path), dinov2.bundle, threads=1).frozen(images, 1)
    assert one.folder != two.folder


def test_states_of_other_decoding_code_are_never_used(
    vit: Built, images: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = set()
    for version in (1, 2):
        monkeypatch.setattr(inputs, "DECODING", version)
        folders.add(FeatureCache(DiskCache(tmp_path), vit.bundle, threads=1).frozen(images, 1).folder)
    assert len(folders) == 2


def test_unused_states_above_a_lora_are_dropped(vit: Built, images: Samples, tmp_path: Path, memory: Memory) -> None:
    cache = FeatureCache(DiskCache(tmp_path), vit.bundle, threads=1, free_memory=memory.free)
    theta = random_theta(vit.bundle, LAYERS, 7)
    old = cache.lifted(images, LAYERS, 2, theta).folder
    cache.drop_unused()
    assert (tmp_path / old).is_dir()
    kept = cache.lifted(images, LAYERS, 2, theta * 2).folder
    cache.drop_unused()
    assert not (tmp_path / old).exists()
    assert (tmp_path / kept).is_dir()
    memory.forbid()
    for level in range(1, LAYERS + 1):
        cache.frozen(images, level)
    cache.pooled(images, 1)


def test_no_images_have_no_features(vit: Built, tmp_path: Path) -> None:
    cache = FeatureCache(DiskCache(tmp_path), vit.bundle, threads=1)
    assert cache.pooled((), 1).shape == (0, 32)
    assert list(cache.frozen((), 1).batches()) == []


def test_the_cache_stays_valid_when_the_photos_move(
    vit: Built, photos: Path, images: Samples, tmp_path: Path, memory: Memory
) -> None:
    cache = FeatureCache(DiskCache(tmp_path / "cache"), vit.bundle, threads=1, free_memory=memory.free)
    before = whole(cache.frozen(images, 1))
    moved = scan_once(shutil.copytree(photos, tmp_path / "moved"), CLASSES, IMAGES).train[:11]
    memory.forbid()
    assert np.array_equal(whole(cache.frozen(moved, 1)), before)


STATE = 4096  # bytes of disk that a state of the tiny ViT takes: 17 tokens of 32 values in fp16, rounded up to a block


def on_disk(root: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in root.glob("*/*"))


@pytest.mark.parametrize("states", [0, 1, 5, 11, 16, 40])
def test_a_budget_changes_no_result_and_is_kept(vit: Built, images: Samples, tmp_path: Path, states: int) -> None:
    """None at all, one image, half of them, all, some of the next level's too, everything."""
    theta = random_theta(vit.bundle, LAYERS, 8)

    def everything(cache: FeatureCache) -> list[Floats]:
        found = []
        for level in (1, 2):
            found += [cache.pooled(images, level), whole(cache.frozen(images, level))]
            found.append(whole(cache.lifted(images, LAYERS, level, theta)))
            cache.drop_unused()
        return found

    unlimited = everything(FeatureCache(DiskCache(tmp_path / "unlimited"), vit.bundle, threads=1))
    root = tmp_path / "limited"
    cache = FeatureCache(DiskCache(root, states * STATE), vit.bundle, threads=1)
    for expected, found in zip(unlimited, everything(cache), strict=True):
        assert np.allclose(found, expected, atol=2e-3)
        assert on_disk(root) <= states * STATE


def test_present_states_and_features_stay_when_the_budget_is_short(
    vit: Built, images: Samples, tmp_path: Path, memory: Memory
) -> None:
    disk = DiskCache(tmp_path, 2 * len(images) * STATE)
    cache = FeatureCache(disk, vit.bundle, threads=1, free_memory=memory.free)
    theta = random_theta(vit.bundle, LAYERS, 9)
    cache.pooled(images, 1)
    lifted = cache.lifted(images, 2, 1, theta).folder
    assert not (tmp_path / lifted).exists()
    present = cache.frozen(images, 1)
    memory.forbid()
    whole(present)
    cache.pooled(images, 1)
    assert disk.used == 2 * len(images) * STATE


def test_what_fits_is_computed_once_and_the_rest_each_time(
    vit: Built, photos: Path, images: Samples, tmp_path: Path
) -> None:
    cache = FeatureCache(DiskCache(tmp_path, (len(images) + 5) * STATE), vit.bundle, threads=1)  # features, 5 states
    whole(cache.frozen(images, 1))
    for _ in range(2):
        with opened_below(photos) as loaded:
            whole(cache.frozen(images, 1))
        assert len(loaded) == len(images) - 5


def test_memory_is_freed_before_each_graph_is_opened(
    vit: Built, images: Samples, tmp_path: Path, memory: Memory
) -> None:
    cache = FeatureCache(DiskCache(tmp_path), vit.bundle, threads=1, free_memory=memory.free)
    cache.lifted(images, LAYERS, 2, random_theta(vit.bundle, LAYERS, 1))
    assert memory.freed == 2  # features.onnx, lift-0.onnx
    memory.forbid()
    with pytest.raises(AssertionError):
        cache.precise().frozen(images, 1)
    assert cache.used == DiskCache(tmp_path).used


def change(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"more")


def spoil(path: Path) -> None:
    path.write_bytes(b"no image")


@pytest.mark.parametrize("happens", [change, spoil, Path.unlink])
@pytest.mark.parametrize("late", [False, True])
def test_a_photo_that_has_changed_since_the_scan_is_not_used(
    vit: Built, photos: Path, tmp_path: Path, happens: Callable[[Path], None], late: bool
) -> None:
    """Before a pass, or during it."""
    moved = scan_once(shutil.copytree(photos, tmp_path / "photos"), CLASSES, IMAGES).train[:3]
    changed = moved[1].path

    class Disturbed(SampleReader):
        def batch(self, samples: Sequence[Sample]) -> dict[str, np.ndarray]:
            happens(changed)
            return super().batch(samples)

    reader = SampleReader(reader_of(vit.bundle))
    if late:
        reader = Disturbed(reader_of(vit.bundle))
    else:
        happens(changed)
    cache = FeatureCache(DiskCache(tmp_path / "cache"), vit.bundle, threads=1, reader=reader)
    with pytest.raises(SampleChangedError, match=f"{changed.name} has changed") as raised:
        cache.frozen(moved, 1)
    assert raised.value.path == changed


@pytest.mark.parametrize("is_kept", [True, False], ids=["kept", "not kept"])
def test_a_new_photo_is_opened_once_from_the_scan_to_its_feature(
    vit: Built, photos: Path, tmp_path: Path, is_kept: bool
) -> None:
    """Or twice, if its pixels did not fit in memory until the features are computed."""
    (tmp_path / "state").mkdir()
    root = set_dates(shutil.copytree(photos, tmp_path / "photos"))
    reader = SampleReader(reader_of(vit.bundle), kept_bytes=2**20 if is_kept else 0)
    folder = SampleFolder(root, vit.bundle, DeviceStore(tmp_path / "state"), reader=reader)
    cache = FeatureCache(DiskCache(tmp_path / "cache"), vit.bundle, threads=1, reader=reader)
    with opened_below(root) as scanned:
        splits = folder.scan()
    with opened_below(root) as computed:
        cache.pooled(splits.samples, 1)
        whole(cache.frozen(splits.samples, 1))
    assert len(scanned) == len(splits.samples) == 40
    assert len(computed) == (0 if is_kept else 40)


def test_a_photo_that_was_read_is_used_as_it_was_then(vit: Built, photos: Path, tmp_path: Path) -> None:
    root = set_dates(shutil.copytree(photos, tmp_path / "photos"))
    (tmp_path / "state").mkdir()
    reader = SampleReader(reader_of(vit.bundle))
    samples = SampleFolder(root, vit.bundle, DeviceStore(tmp_path / "state"), reader=reader).scan().train
    (direct,) = run_graph(vit.bundle, "features.onnx", ["pooled"], **inputs_of(vit, samples))
    spoil(samples[0].path)
    cache = FeatureCache(DiskCache(tmp_path / "cache"), vit.bundle, threads=1, reader=reader)
    assert relative_error(cache.pooled(samples, 1), direct) < 1e-6


def test_a_tokenizer_is_parsed_once(bert: Built, texts: Path, tmp_path: Path) -> None:
    samples = scan_once(texts, CLASSES, TEXTS).train
    with opened_below(bert.bundle.root) as opened:
        cache = FeatureCache(DiskCache(tmp_path), bert.bundle, threads=1)
        for level in (1, 2, 3):
            cache.pooled(samples, level)
            whole(cache.frozen(samples, level))
            whole(cache.precise().frozen(samples, level))
    assert opened.count("tokenizer.json") == 1


def test_states_of_deleted_samples_are_dropped(vit: Built, images: Samples, tmp_path: Path) -> None:
    cache = FeatureCache(DiskCache(tmp_path), vit.bundle, threads=1)
    cache.pooled(images, 1)
    cache.lifted(images, LAYERS, 1, random_theta(vit.bundle, LAYERS, 7))
    cache.precise().frozen(images, 1)
    others = images[2:5]
    cache.drop_others(others)
    folders = list(tmp_path.iterdir())
    assert len(folders) > 3
    for folder in folders:
        assert {path.name for path in folder.iterdir()} == {sample.sha256 for sample in others}
