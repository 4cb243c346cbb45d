"""A run that goes on from an earlier run, or from an adapter."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load, save
from support.bundles import LAYERS, RANK, Built, hidden_of, random_samples, random_theta, run_graph, with_names
from support.coordinators import PRIVACY, RULE, plan_for
from support.offline_server import OfflineServer
from support.samples import CLASSES

from export.reference import add_lora
from fedfmsl.algorithms.accounting import Observer, epsilons
from fedfmsl.algorithms.sal import AllAtOnce, Sal
from fedfmsl.common.whole_folder import write_folder
from fedfmsl.errors import ConfigError, RunError
from fedfmsl.protocol.messages import Stage, Sums
from trainer_server.config import Aggregation, Head, Rule
from trainer_server.coordinator.privacy_budget import NoisedRounds, privacy_budget
from trainer_server.coordinator.warm_start import warm_start
from trainer_server.service.lifecycle import make_plan, open_run, replay_rounds
from trainer_server.storage.adapter_reader import read_adapter
from trainer_server.storage.peft_adapter import adapter_files
from trainer_server.storage.run_store import RunStore

LEVEL = 2
OTHERS = ("plum", "cherry", "apple")  # one class is new, two leave, and the order changes


def started(built: Built, folder: Path, source: Path | None = None, **config: Any) -> OfflineServer:
    settings = plan_for(built, **{"stage1_rounds": 3, "stage2_rounds": 1, "audit": True, **config}).config
    store = open_run(folder, settings, built.bundle, source)
    return OfflineServer(store, make_plan(store, built.bundle))


@pytest.fixture(scope="module")
def earlier(vit: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run, whose SAL has reached level 2."""
    server = started(vit, tmp_path_factory.mktemp("earlier") / "run").run()
    assert server.state.sal.level == LEVEL
    server.store.close()
    return server.store.folder


def last_state(folder: Path) -> Any:
    store = RunStore(folder)
    found = store.state()
    store.close()
    assert found is not None
    return found[0]


def test_the_same_classes_go_on_bit_by_bit(vit: Built, earlier: Path, tmp_path: Path) -> None:
    """A statistics round would have nothing to add."""
    before, server = last_state(earlier), started(vit, tmp_path / "run", earlier, head=Head.CLASS_MEANS)
    assert server.state.expert.tobytes() == before.trained.tobytes()
    assert server.state.gate.tobytes() == before.gate.tobytes()
    assert server.state.sal.level == LEVEL
    for event in server.joins():
        server.feed(event)
    announced = server.state.announced
    assert announced is not None and (announced.stage, announced.level) == (Stage.GLOBAL, LEVEL)
    assert announced.expert and announced.start and announced.gate  # devices get them at once


def test_other_classes_start_with_the_rows_of_the_kept_ones(vit: Built, earlier: Path, tmp_path: Path) -> None:
    """And get class means for new ones, where there are sums."""
    new = with_names(vit, OTHERS)
    server = started(new, tmp_path / "run", earlier, head=Head.CLASS_MEANS)
    samples = random_samples(vit, 4, seed=1)

    def logits(built: Built, expert: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        theta = expert[: built.bundle.expert.size(LEVEL)]
        hidden = hidden_of(vit, samples, LEVEL)
        (found,) = run_graph(built.bundle, f"predict-{LEVEL}.onnx", ["logits"], hidden=hidden, theta=theta)
        return dict(zip(built.bundle.classes, found.T, strict=True))

    before, first = logits(vit, last_state(earlier).trained), logits(new, server.state.expert)
    for event in server.joins():
        server.feed(event)
    assert server.state.announced is not None and server.state.announced.stage is Stage.STATISTICS
    for event in list(server.answers()):
        server.feed(event)
    assert server.state.announced.stage is Stage.GLOBAL
    second = logits(new, server.state.expert)
    for name in ("plum", "apple"):
        assert np.allclose(first[name], before[name], atol=1e-5)
        assert np.array_equal(second[name], first[name])
    assert np.allclose(first["cherry"], (first["plum"] + first["apple"]) / 2, atol=1e-4)
    assert not np.allclose(second["cherry"], first["cherry"], atol=1e-2)
    assert server.run().store.ended == "finished"


def test_a_replay_does_not_need_the_earlier_folder(vit: Built, earlier: Path, tmp_path: Path) -> None:
    source = shutil.copytree(earlier, tmp_path / "source")
    server = started(with_names(vit, OTHERS), tmp_path / "run", source).run()
    shutil.rmtree(source)
    store = RunStore(server.store.folder)
    again = list(replay_rounds(store, make_plan(store, server.plan.bundle)))
    assert again[:-1] == [closed.round for closed in store.rounds.all()]
    assert store.origin.start is not None
    closed = len(RunStore(earlier).rounds.all())
    text = f"{source}, run 'r' after round {closed}, at level 2; new: cherry; removed: kiwi, lemon"
    assert store.origin.start.text == text
    reopened = open_run(store.folder, store.origin.config, server.plan.bundle, source)  # the same command resumes
    assert reopened.ended == "finished"


def test_stage_2_can_start_at_once(vit: Built, earlier: Path, tmp_path: Path) -> None:
    server = started(vit, tmp_path / "run", earlier, stage1_rounds=0).run()
    stages = [closed.round.stage for closed in server.store.rounds.all()]
    assert stages == [Stage.PERSONAL, Stage.EVALUATE]
    with pytest.raises(ConfigError, match="--stage1-rounds 0 needs --from"):
        started(vit, tmp_path / "other", stage1_rounds=0)


def test_training_goes_on_from_the_trained_head(vit: Built, tmp_path: Path) -> None:
    """And not from that of the sums, which it would change too much; stage 2 alone needs the latter."""
    sums = {"head_sums": Sums.LOGITS, "secure_sums": False}
    server = started(vit, tmp_path / "earlier", **sums).run()
    head, before = vit.bundle.expert.size(0), last_state(server.store.folder)
    assert before.former.head.size and not np.array_equal(before.former.head, before.expert[:head])
    expected = {0: before.expert[:head], 3: before.former.head}
    for rounds, found in expected.items():
        following = started(vit, tmp_path / str(rounds), server.store.folder, stage1_rounds=rounds, **sums)
        assert np.array_equal(following.state.expert[:head], found)
        assert np.array_equal(following.state.expert[head:], before.expert[head:])


def test_without_sums_training_makes_the_row_of_a_new_class(vit: Built, earlier: Path, tmp_path: Path) -> None:
    server = started(with_names(vit, OTHERS), tmp_path / "run", earlier, head=Head.ZEROS).run()
    assert server.store.rounds.all()[0].round.stage is Stage.GLOBAL
    start = server.plan.bundle.expert.split(server.state.start)
    assert server.state.start.size == server.plan.bundle.expert.size(LEVEL)  # of the warm start, for comparison
    assert np.allclose(start["classifier.weight"][1], start["classifier.weight"][[0, 2]].mean(axis=0), atol=1e-5)


NOISY = {
    "privacy": PRIVACY,
    "aggregation": Aggregation(rule=Rule.MEAN),
    "stage1_sal": Sal(AllAtOnce(), LAYERS),
    "stage2_sal": Sal(AllAtOnce(), LAYERS),
}


def budget(server: OfflineServer) -> dict[str, float]:
    store = server.store
    closed = NoisedRounds.of(store.rounds.counts(), store.origin.spent_before)
    return privacy_budget(store.origin.config, closed, server.state.announced, is_answered=False)


def test_the_privacy_budget_adds_up_over_three_runs(vit: Built, earlier: Path, tmp_path: Path) -> None:
    one = started(vit, tmp_path / "one", **NOISY).run()
    two = started(vit, tmp_path / "two", one.store.folder, **NOISY).run()
    three = started(vit, tmp_path / "three", two.store.folder, **{**NOISY, "stage1_rounds": 1}).run()
    noised = 5 + 4 + 2  # only the first run has a round of class means
    expected = {observer.value: value for observer, value in epsilons(PRIVACY, noised, 1e-5).items()}
    assert budget(three) == pytest.approx(expected, rel=1e-6)
    assert three.store.origin.uncounted == ""
    after_none = started(vit, tmp_path / "after", earlier, **NOISY)
    assert after_none.store.origin.uncounted.startswith(f"ε counts this run only: what was sent for {earlier} had no")
    assert set(budget(after_none)) == {observer.value for observer in Observer}


def test_an_adapter_of_every_family_is_read_as_it_was_written(built: Built, tmp_path: Path) -> None:
    theta = random_theta(built.bundle, LEVEL, seed=8)
    write_folder(tmp_path / "adapter", adapter_files(built.bundle, theta, LEVEL))
    adapter = read_adapter(tmp_path / "adapter", built.bundle)
    assert (adapter.classes, adapter.level) == (CLASSES, LEVEL)
    assert np.array_equal(adapter.expert, theta)
    warm = warm_start(built.bundle, adapter.classes, adapter.expert, adapter.level)
    initial, gate = built.bundle.initial()
    assert np.array_equal(warm.expert[: theta.size], theta)
    assert np.array_equal(warm.expert[theta.size :], initial[theta.size :])
    assert np.array_equal(warm.gate, gate)


def test_an_adapter_that_peft_has_saved_is_read(vit: Built, tmp_path: Path) -> None:
    model = add_lora(vit.source, vit.bundle.manifest.lora, LEVEL, seed=3)
    try:
        config = model.peft_config["default"]
        config.base_model_name_or_path = vit.bundle.manifest.peft.base
        model.save_pretrained(tmp_path, save_embedding_layers=False)
        head = model.base_model.model.classifier.modules_to_save["default"].weight.detach().numpy().copy()
    finally:
        model.unload()
    (tmp_path / "labels.json").write_text(json.dumps(dict(enumerate(CLASSES))))
    adapter = read_adapter(tmp_path, vit.bundle)
    assert np.array_equal(adapter.expert[: head.size].reshape(head.shape), head)


def change_config(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def of_another_base(folder: Path) -> None:
    change_config(folder, base_model_name_or_path="google/other", revision="abc")
    tensors = folder / "adapter_model.safetensors"
    tensors.write_bytes(save(load(tensors.read_bytes()), {"format": "pt"}))


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "another base": (of_another_base, r"is for another backbone \(google/other at abc\) than the bundle"),
    "another rank": (lambda folder: change_config(folder, r=RANK + 1), "has r = 5, and the bundle at .* needs 4"),
    "other blocks": (
        lambda folder: change_config(folder, layers_to_transform=[0, 1]),
        r"has layers_to_transform = \[0, 1\], and the bundle at .* needs \[1, 2\]",
    ),
    "no names": (lambda folder: (folder / "labels.json").unlink(), "has no readable labels.json"),
    "wrong names": (lambda folder: (folder / "labels.json").write_text("[]"), "must have names by number"),
    "no tensors": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "no readable adapter_model.saf"),
    "damaged tensors": (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x" * 20), "is damaged"),
    "fewer names": (
        lambda folder: (folder / "labels.json").write_text('{"0": "apple", "1": "kiwi"}'),
        "does not fit the bundle at .*classifier.weight",
    ),
    "no class": (
        lambda folder: (folder / "labels.json").write_text('{"0": "a", "1": "b", "2": "c", "3": "d"}'),
        "none of which this run has",
    ),
    "another folder": (lambda folder: (folder / "adapter_config.json").unlink(), "neither the folder of a run"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_an_adapter_that_cannot_be_used_is_one_clear_error(vit: Built, tmp_path: Path, wrong: str) -> None:
    folder = tmp_path / "adapter"
    write_folder(folder, adapter_files(vit.bundle, random_theta(vit.bundle, LEVEL, seed=8), LEVEL))
    damage, text = WRONG[wrong]
    damage(folder)
    with pytest.raises(ConfigError, match=text) as error:
        started(vit, tmp_path / "run", folder)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_run_that_cannot_be_used_is_one_clear_error(vit: Built, deit: Built, earlier: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"was run with another bundle \(SHA-256"):
        started(deit, tmp_path / "run", earlier)
    low = Sal(RULE.trigger, max_level=1)
    with pytest.raises(ConfigError, match=r"is at level 2, above --max-level 1; raise it"):
        started(vit, tmp_path / "run", earlier, stage1_sal=low)
    started(vit, tmp_path / "unstarted")
    with pytest.raises(RunError, match="has no global expert yet"):
        started(vit, tmp_path / "run", tmp_path / "unstarted")


def test_the_command_that_resumes_names_the_same_start(vit: Built, earlier: Path, tmp_path: Path) -> None:
    fresh = started(vit, tmp_path / "fresh")
    warm = started(vit, tmp_path / "warm", earlier)
    for server in (fresh, warm):
        for event in server.joins():
            server.feed(event)
    with pytest.raises(ConfigError, match="holds run 'r', which starts afresh; give the same --from"):
        started(vit, tmp_path / "fresh", earlier)
    with pytest.raises(ConfigError, match=f"holds run 'r', which goes on from {earlier}; give the same --from"):
        started(vit, tmp_path / "warm")
