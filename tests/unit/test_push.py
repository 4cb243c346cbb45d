"""A global expert on its way to the hub and back: what is sent, what is said before, what is wrong in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, constants, file_download
from huggingface_hub.utils import reset_sessions
from support.bundles import Built, random_theta
from support.coordinators import ABC, CoordinatorRun, started
from support.hub import Hub
from support.processes import free_port
from typer.testing import CliRunner

from export.__main__ import app
from fedfmsl.errors import FedFMSLError
from fedfmsl.protocol.messages import Stage
from fedfmsl.protocol.task import Task
from fedfmsl.protocol.task_bundle import TaskBundle
from trainer_server.coordinator.events import StoreRound
from trainer_server.service.expert_folder import ExpertFolder
from trainer_server.storage.model_card import model_card, result_of

REPO, TOKEN = "me/orchard", "hf_secret"


def use(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the hub's client talks to this address. It reads HF_ENDPOINT only when it is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    hub = Hub(TOKEN)
    use(hub.url, monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    reset_sessions()
    yield hub
    hub.shutdown()
    reset_sessions()


@pytest.fixture(scope="module")
def trained(vit: Built) -> CoordinatorRun:
    """A run of three devices to its end."""
    run = started(vit, ABC, stage1_rounds=1, stage2_rounds=1)
    run.until_stop(ABC)
    return run


@pytest.fixture
def expert(vit: Built, trained: CoordinatorRun, tmp_path: Path) -> Path:
    """The folder of its global expert."""
    folder = ExpertFolder(trained.plan, tmp_path / "global_expert")
    for command in trained.of(StoreRound):
        folder.round_closed(command.closed, random_theta(vit.bundle, 2, seed=1))
    return tmp_path / "global_expert"


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments)
    if isinstance(result.exception, FedFMSLError):
        raise result.exception
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def test_the_card_has_what_the_hub_and_its_readers_need(expert: Path, trained: CoordinatorRun) -> None:
    card = ModelCard.load(expert / "README.md")
    data = card.data.to_dict()
    assert (data["library_name"], data["pipeline_tag"]) == ("peft", "image-classification")
    assert "base_model" not in data  # it was a local folder
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_type) == ("accuracy", 0.5, "private")
    assert (expert / "preprocessor_config.json").is_file()
    for text in ('0 "apple"', "3 devices", "held-out samples", "is not comparable"):
        assert text in card.text
    evaluated = next(c.closed for c in trained.of(StoreRound) if c.closed.round.stage is Stage.EVALUATE)
    assert result_of(evaluated) is None  # no accuracy of the test split was reported


def test_the_folder_follows_a_rollback_during_the_evaluation(
    vit: Built, trained: CoordinatorRun, tmp_path: Path
) -> None:
    folder, adapter = ExpertFolder(trained.plan, tmp_path / "expert"), tmp_path / "expert" / "adapter_model.safetensors"
    rounds = [command.closed for command in trained.of(StoreRound)]
    dropped = rounds[-1].model_copy(update={"updates": {}, "repeated": "rolled back to the global expert of round 2"})
    contents = []
    for seed, closed in enumerate([*rounds[:-1], dropped]):
        folder.round_closed(closed, random_theta(vit.bundle, 2, seed))
        contents.append(adapter.read_bytes() if adapter.is_file() else b"")
    assert contents[-1] != contents[-2]


def test_a_resumed_server_writes_the_folder_again(expert: Path, trained: CoordinatorRun) -> None:
    names = {path.name for path in expert.iterdir()}
    (expert / "adapter_model.safetensors").write_bytes(b"")  # after a power failure
    ExpertFolder(trained.plan, expert).resumed(trained.state, None)
    assert {path.name for path in expert.iterdir()} == names
    assert (expert / "adapter_model.safetensors").stat().st_size > 1000
    assert "No accuracy was reported" in (expert / "README.md").read_text()


def test_a_base_on_the_hub_and_strange_names_are_valid_metadata(vit: Built, trained: CoordinatorRun) -> None:
    bundle = TaskBundle(vit.bundle, Task(vit.bundle.sha256, ("---", "a: b", '"', "```")))
    peft = bundle.manifest.peft.model_copy(update={"base": "facebook/dinov2-small", "revision": "1" * 40})
    bundle.manifest = bundle.manifest.model_copy(update={"peft": peft})
    card = ModelCard(model_card(bundle, trained.plan.config, 2, None))
    assert card.data.base_model == "facebook/dinov2-small"
    assert "base_model:adapter:facebook/dinov2-small" in card.data.tags
    assert '1 "a: b"' in card.text and "No accuracy was reported" in card.text


def test_a_pushed_expert_comes_back_bit_by_bit(hub: Hub, expert: Path, tmp_path: Path) -> None:
    said = run("push", REPO, "--folder", str(expert), "--license", "cc-by-4.0", "--yes")
    repository = hub.repositories[REPO]
    assert repository.private
    assert TOKEN not in said
    for text in ("private", "weights ", "class names   apple, kiwi, lemon, plum", "Accuracy 50.0% on held-out"):
        assert text in said
    (sent,) = repository.files.values()
    assert set(sent) == {path.name for path in expert.iterdir()}
    assert yaml.safe_load(sent["README.md"].decode().split("---\n")[1])["license"] == "cc-by-4.0"
    run("pull", REPO, "--to", str(tmp_path / "back"))
    for path in expert.iterdir():
        if path.name != "README.md":
            assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()
    assert json.loads((tmp_path / "back" / "labels.json").read_text())["0"] == "apple"


def test_an_interrupted_transfer_goes_on_where_it_ended(hub: Hub, expert: Path, tmp_path: Path) -> None:
    hub.fail["commit/main"] = 500
    with pytest.raises(FedFMSLError, match="500"):
        run("push", REPO, "--folder", str(expert), "--yes")
    run("push", REPO, "--folder", str(expert), "--yes")
    assert sum(method == "PUT" for method, _ in hub.requests) == 1  # the weights were there already
    hub.fail["adapter_model.safetensors"] = 0  # the connection closes in the middle
    pull = ("pull", REPO, "--to", str(tmp_path / "back"))
    with pytest.raises(FedFMSLError, match="repeat the command: it goes on where it ended"):
        run(*pull)
    there = {path.name for path in (tmp_path / "back").iterdir()}
    hub.requests.clear()
    run(*pull)
    assert not there & {path.rpartition("/")[2] for method, path in hub.requests if method == "GET"}
    weights = "adapter_model.safetensors"
    assert (tmp_path / "back" / weights).read_bytes() == (expert / weights).read_bytes()


def test_what_would_be_seen_by_others_needs_consent(hub: Hub, expert: Path) -> None:
    with pytest.raises(FedFMSLError, match="nothing was sent: push asks before it sends; pass --yes"):
        run("push", REPO, "--folder", str(expert))
    assert hub.requests == []
    run("push", REPO, "--folder", str(expert), "--yes", "--public")
    assert not hub.repositories[REPO].private
    with pytest.raises(FedFMSLError, match=f"nothing was sent: {REPO} is public; pass --public"):
        run("push", REPO, "--folder", str(expert), "--yes")


@pytest.mark.parametrize(
    ("fail", "line"),
    [
        ({"create": 401}, "does not accept the token; renew it with hf auth login"),
        ({"commit/main": 403}, r"the token may not do this \(403\)"),
        ({"preupload": 404}, "there is no such repository, or the token may not see it"),
    ],
)
def test_a_refused_push_ends_with_one_line(hub: Hub, expert: Path, fail: dict[str, int], line: str) -> None:
    hub.fail |= fail
    with pytest.raises(FedFMSLError, match=line) as caught:
        run("push", REPO, "--folder", str(expert), "--yes")
    assert "\n" not in str(caught.value) and TOKEN not in str(caught.value)


def test_what_is_missing_is_named(hub: Hub, expert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = ("pull", REPO, "--to", str(tmp_path / "back"))
    with pytest.raises(FedFMSLError, match=f"cannot pull {REPO}: there is no such repository"):
        run(*there)
    run("push", REPO, "--folder", str(expert), "--yes")
    with pytest.raises(FedFMSLError, match="it has no such revision; check --revision"):
        run(*there, "--revision", "v9")
    with pytest.raises(FedFMSLError, match="is not a name of a repository"):
        run("pull", "a/b/c", "--to", str(tmp_path / "back"))
    hub.repositories[REPO].files = {"0" * 40: {"README.md": b"other"}}
    with pytest.raises(FedFMSLError, match=r"is not a global expert of FedFMSL: it has no adapter_config\.json"):
        run(*there)
    with pytest.raises(FedFMSLError, match="pass the global_expert folder of a run"):
        run("push", REPO, "--folder", str(tmp_path), "--yes")
    (damaged := Path(shutil.copytree(expert, tmp_path / "damaged")) / "labels.json").write_text("[")
    with pytest.raises(FedFMSLError, match=r"labels\.json or README\.md in .* is damaged"):
        run("push", REPO, "--folder", str(damaged.parent), "--yes")
    (bare := Path(shutil.copytree(expert, tmp_path / "bare")) / "README.md").write_text("# No metadata\n")
    with pytest.raises(FedFMSLError, match=r"is damaged .*no metadata"):
        run("push", REPO, "--folder", str(bare.parent), "--yes", "--license", "mit")
    with pytest.raises(FedFMSLError, match="is not an identifier of the hub"):
        run("push", REPO, "--folder", str(expert), "--yes", "--license", "mine: all")
    use(f"http://127.0.0.1:{free_port()}", monkeypatch)
    for command in (there, ("push", REPO, "--folder", str(expert), "--yes")):
        with pytest.raises(FedFMSLError, match=r"the hub does not answer at http://127\.0\.0\.1"):
            run(*command)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(FedFMSLError, match="'bad name' is not a name of a repository"):
        run("push", "bad name", "--folder", str(expert), "--yes")
    with pytest.raises(FedFMSLError, match="there is no token of the hub; set HF_TOKEN, or run: hf auth login"):
        run("push", REPO, "--folder", str(expert), "--yes")
