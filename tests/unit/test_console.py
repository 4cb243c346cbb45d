"""What the operator's console shows of stored runs, and what it lets an operator do. A browser and a real server are
in tests/integration/test_console_in_chromium.py."""

from __future__ import annotations

import html
import io
import re
import resource
import shutil
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from support.bundles import Built
from support.coordinators import started
from support.stored_runs import closed_round, stored_run
from support.web import ask, csrf_of

from fedfmsl.protocol.messages import Activity, DeviceStatus, Health
from fedfmsl.transport.listening import listen
from fedfmsl.web.access import Access
from fedfmsl.web.serve import WebServer
from trainer_server.console import snapshot, views
from trainer_server.console.pages import console
from trainer_server.console.snapshot import RunReader, Runs, Snapshot
from trainer_server.coordinator.events import OperatorActed
from trainer_server.coordinator.limits import Limits
from trainer_server.coordinator.operator import Action, Operation
from trainer_server.storage.event_rows import LoggedEvent
from trainer_server.storage.kept_experts import KeptExperts
from trainer_server.storage.observations import DeviceView, Observations, ServerView, read_observations
from trainer_server.storage.operations import Operations
from trainer_server.storage.origin import Origin
from trainer_server.storage.refusal_counts import RefusalCount
from trainer_server.storage.run_store import RunStore

HOSTILE = "<script>alert(1)</script>"


@contextmanager
def open_console(folder: Path) -> Iterator[WebServer]:
    listeners = listen("--console", "127.0.0.1", 0)
    access = Access("127.0.0.1", listeners[0].getsockname()[1], None, encrypted=False)
    with WebServer(console(folder, access), listeners) as site:
        yield site


def path_of(folder: Path) -> str:
    """The path of a run's page."""
    (key,) = (reader.key for reader in Runs(folder).readers())
    return f"/runs/{key}/"


def with_devices(tmp_path: Path, built: Built, **devices: DeviceView) -> Snapshot:
    origin = Origin(
        config=started(built).plan.config, session="s", bundle=tmp_path, sha256="", task=built.bundle.task.sha256
    )
    return Snapshot("key", tmp_path, origin, devices=devices)


def rows(run: Snapshot) -> list[views.Row]:
    return [views.row(run, name) for name in views.names(run)]


def status(device: str, **fields: object) -> DeviceStatus:
    return DeviceStatus.model_validate({"device": device, "online": True, **fields})


def test_the_pages_of_a_run(vit: Built, tmp_path: Path) -> None:
    folder = stored_run(tmp_path / "shops", vit, devices=3, rounds=4, board=HOSTILE)
    (folder / "notes.log").write_text(f"first line\n{HOSTILE}\n")
    with open_console(folder) as site:
        assert ask(site)[2]["location"] == path_of(folder)
        shown = {name: ask(site, path_of(folder) + name)[1] for name in ("", "devices", "rounds", "rounds/4", "log")}
        assert "80.0 %" in shown[""]  # the held-out accuracy of the last round
        assert "apple, <bdi>" in shown[""].replace("</bdi>", "")
        assert "device-0002" in shown["devices"]
        assert shown["rounds"].index(">4</a>") < shown["rounds"].index(">1</a>")
        assert 'Missing: <span class="name">device-0000' in shown["rounds/4"]
        assert shown["log"].index("&lt;script") < shown["log"].index("first line")
        assert not any(HOSTILE in text for text in shown.values())
        for missing in ("rounds/5", "rounds/99999999999", "nowhere", "devices/../../x"):
            assert ask(site, path_of(folder) + missing)[0] == 404
        assert ask(site, "/runs/unknown/")[0] == 404
        path = path_of(folder)
        hidden = (folder / "run.sqlite").rename(folder / "elsewhere")
        status_, text, _ = ask(site, f"{path}rounds/4")
        assert (status_, "cannot be read at this moment" in text) == (503, True)
        hidden.rename(folder / "run.sqlite")
        assert ask(site, path_of(folder) + "log.txt")[1].startswith("first line")


def test_several_runs_and_a_new_one_are_found(vit: Built, tmp_path: Path) -> None:
    stored_run(tmp_path / "alpha" / "server", vit, devices=1, rounds=1, ended="finished")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.sqlite").write_text("no database")
    with open_console(tmp_path) as site:
        stored_run(tmp_path / "beta", vit, devices=1, rounds=1)
        stored_run(tmp_path / "gamma", vit, devices=1, rounds=1, ended="too few devices")
        text = ask(site)[1]
    states = re.findall(r'<td class="(good|warn|bad)">([a-z ]+)</td>', text)
    assert states == [("good", "finished"), ("warn", "waiting for devices"), ("bad", "failed")]


@pytest.mark.parametrize(
    ("field", "text", "word"),
    [
        ("waits", "2 devices must answer and 1 can. Missing: b (offline)", "waiting for devices"),
        ("rests", "until 2026-11-27 22:00 (--schedule 22:00-06:00)", "rests"),
    ],
)
def test_a_run_that_waits_or_rests_says_for_what(vit: Built, tmp_path: Path, field: str, text: str, word: str) -> None:
    folder = stored_run(tmp_path / "r", vit, devices=2, rounds=1)
    Observations(folder).save(ServerView(seen=time.time()).model_copy(update={field: text}), {})
    with open_console(folder) as site:
        page = ask(site, path_of(folder))[1]
    assert f">{word}</small>" in page and f"The run {field}: {text}." in page


def test_the_state_of_a_device_has_its_reason(vit: Built, tmp_path: Path) -> None:
    run = with_devices(
        tmp_path,
        vit,
        a=DeviceView(status=status("a")),
        b=DeviceView(status=status("b", paused="on battery")),
        c=DeviceView(status=status("c", online=False, error="no heartbeat")),
        d=DeviceView(),
        e=DeviceView(status=status("e", error="its disk is full")),
        f=DeviceView(status=status("f")),
        g=DeviceView(status=status("g")),
    )
    left_out = {"f": 12}
    run = Snapshot(
        **{**vars(run), "left_out": left_out, "server": ServerView(seen=0, excluded=("g",)), "expected": {*"abg"}}
    )
    found = {row.name: (row.state, row.why) for row in rows(run)}
    assert found == {
        "a": ("online", ""),
        "b": ("paused", "on battery"),
        "c": ("error", "no heartbeat"),
        "d": ("offline", ""),
        "e": ("error", "its disk is full"),
        "f": ("left out", "until round 12: its updates were refused"),
        "g": ("excluded", "by the operator"),
    }
    ended = Snapshot(**{**vars(run), "ended": "finished"})
    after = {(row.state, row.why) for row in rows(ended)}
    assert after == {("run ended", ""), ("excluded", "by the operator")}
    assert {state for state, _ in {*found.values(), *after}} == set(views.STATES)
    assert views.names(run, only="error") == ["c", "e"]
    assert views.names(run, search="B") == ["b"]
    assert views.missing(run) == [("a", "is online and has not answered"), ("b", "paused: on battery")]


def test_settings_are_single_values_as_they_are_now(vit: Built, tmp_path: Path) -> None:
    run = with_devices(tmp_path, vit)
    before = dict(views.settings(run))
    assert before["stage1: epochs"] == str(run.origin.config.stage1.epochs)
    assert not any(set("{}'") & set(value) for value in before.values())
    limits = Limits.of(run.origin.config).model_copy(update={"max_repeats": 7})
    run = Snapshot(**{**vars(run), "limits": limits, "server": ServerView(seen=0, round_timeout=45.0)})
    now = dict(views.settings(run))
    assert now["round timeout"] == f"45 (at the start {before['round timeout']})"
    assert now["max repeats"].startswith("7")


def test_a_missing_device_at_work_shows_what_was_refused_before(vit: Built, tmp_path: Path) -> None:
    health = Health(device="a", time=1, started=0, activity=Activity.WORKING)
    run = with_devices(tmp_path, vit, a=DeviceView(status=status("a"), health=health, heard=1.0))
    refused = {"a": [RefusalCount("a", "tensors", 3, "not finite")]}
    run = Snapshot(**{**vars(run), "expected": frozenset("a"), "refusals": refused})
    assert views.missing(run) == [("a", "is at work; refused before: not finite")]
    assert rows(run)[0].refused == "tensors 3×: not finite"


def test_an_action_is_confirmed_and_then_waits_for_the_server(vit: Built, tmp_path: Path) -> None:
    folder = stored_run(tmp_path / "shops", vit, devices=3, rounds=1)
    with open_console(folder) as site:
        path = path_of(folder) + "action"
        status_, text, _ = ask(site, f"{path}?action=exclude&device=device-0001")
        assert status_ == 200
        assert "Exclude device-0001 from this run?" in text
        assert Operations(folder).waiting() == []
        form = {"csrf": csrf_of(text), "action": "exclude", "device": "device-0001", "round": "0", "seconds": "0.0"}
        assert ask(site, path, form={**form, "csrf": "x"})[0] == 403
        assert Operations(folder).waiting() == []
        assert ask(site, path, form=form)[0] == 303
        (waiting,) = (operation for _, operation in Operations(folder).waiting())
        assert waiting == Operation(action=Action.EXCLUDE, device="device-0001", by="127.0.0.1")
        for wrong in (
            {"action": "shutdown"},
            {"device": ""},
            {"device": "a/b"},
            {"action": "deadline"},
            {"round": "x"},
        ):
            assert ask(site, path, form={**form, **wrong})[0] == 400


def test_proposed_classes_are_shown_and_added(vit: Built, tmp_path: Path) -> None:
    """Names come from devices. The server shows when it adds one."""
    names = {HOSTILE: 3, 'a, "b"': 2, "quince": 7, "apple": 9}
    folder = stored_run(tmp_path / "shops", vit, devices=2, rounds=1)
    observations = Observations(folder)
    observations.save(ServerView(seen=time.time(), adds=("quince",)), {"x": status("x", proposed=names)})
    observations.close()
    with open_console(folder) as site:
        path = path_of(folder)
        text = ask(site, path)[1]
        assert HOSTILE not in text and "apple</bdi></th>" not in text
        assert "is added after the present round" in text
        (link, _) = sorted(re.findall(r'href="([^"]*action=classes[^"]*)"', text), key=len)
        confirm = ask(site, html.unescape(link))[1]
        assert "Add a, &#34;b&#34; after the present round?" in confirm
        (value,) = re.findall(r'name="classes" value="([^"]*)"', confirm)
        form = {"csrf": csrf_of(confirm), "action": "classes", "round": "0"}
        assert ask(site, f"{path}action", form={**form, "classes": html.unescape(value)})[0] == 303
        (waiting,) = (operation for _, operation in Operations(folder).waiting())
        assert waiting == Operation(action=Action.CLASSES, classes=('a, "b"',), by="127.0.0.1")
        for wrong in ("", '"', "unknown", "a/../b"):
            assert ask(site, f"{path}action", form={**form, "classes": wrong})[0] == 400
        for known in ("Apple", "quince"):
            assert ask(site, f"{path}action", form={**form, "classes": known})[0] == 409
        (link,) = re.findall(r'href="([^"]*action=withdraw[^"]*)"', ask(site, path)[1])
        assert "Withdraw quince, so that it is not added" in ask(site, html.unescape(link))[1]
        assert ask(site, f"{path}action", form={**form, "action": "withdraw", "classes": "apple"})[0] == 409
        assert ask(site, f"{path}action", form={**form, "action": "withdraw", "classes": "quince"})[0] == 303
        last = Operations(folder).waiting()[-1][1]
        assert last is not None and last.action is Action.WITHDRAW


def test_the_page_of_a_round_offers_to_return_to_its_global_expert_if_it_is_kept(vit: Built, tmp_path: Path) -> None:
    folder = stored_run(tmp_path / "shops", vit, devices=3, rounds=2)
    KeptExperts(folder).write(2, np.zeros(3, np.float32))
    with open_console(folder) as site:
        path = path_of(folder)
        offers = ["Return to the global expert" in ask(site, f"{path}rounds/{number}")[1] for number in (1, 2)]
        assert offers == [False, True]
        question = "Return to the global expert that round 2 has made?"
        assert question in ask(site, f"{path}action?action=rollback&round=2")[1]


def test_nothing_of_a_finished_run_can_be_changed_but_its_expert_downloaded(vit: Built, tmp_path: Path) -> None:
    folder = stored_run(tmp_path / "shops", vit, devices=3, rounds=1, ended="finished")
    with open_console(folder) as site:
        path = path_of(folder) + "action"
        form = {"csrf": csrf_of(ask(site, path_of(folder))[1])}
        assert ask(site, path, form={**form, "action": "pause"})[0] == 409
        assert ask(site, path, form={**form, "action": "download"})[0] == 404
        (folder / "global_expert").mkdir()
        (folder / "global_expert" / "adapter_config.json").write_text("{}")
        status_, _, headers = ask(site, path, form={**form, "action": "download"})
        assert status_ == 200
        assert headers["content-disposition"] == 'attachment; filename="shops-global-expert.zip"'
    assert Operations(folder).waiting() == []


def test_an_archive_has_the_files_of_the_global_expert(vit: Built, tmp_path: Path) -> None:
    from trainer_server.console.pages import _archive

    folder = stored_run(tmp_path / "shops", vit, devices=1, rounds=1)
    (folder / "global_expert").mkdir()
    (folder / "global_expert" / "adapter_config.json").write_text("{}")
    with _archive(RunReader("k", folder).snapshot()) as file, zipfile.ZipFile(io.BytesIO(file.read())) as archive:
        assert archive.read("global_expert/adapter_config.json") == b"{}"


def test_a_long_run_of_a_thousand_devices_is_a_small_page(vit: Built, tmp_path: Path) -> None:
    folder = stored_run(tmp_path / "shops", vit, devices=1000, rounds=500)
    with open_console(folder) as site:
        sizes = {}
        for name in ("", "devices", "rounds"):
            text = ask(site, path_of(folder) + name)[1]
            files = re.findall(r'(?:href|src)="(/static/[^"]+)"', text)
            sizes[name] = len(text) + sum(len(ask(site, file)[1]) for file in files)
        assert max(sizes.values()) < 300_000, sizes
        last = ask(site, path_of(folder) + "devices?page=10")[1]
        assert "device-0999" in last
        assert "device-0899" not in last


def test_a_look_at_a_folder_reads_only_what_is_new(vit: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "FRESH_SECONDS", 0.0)
    folder = stored_run(tmp_path / "shops", vit, devices=3, rounds=2)
    reader = RunReader("k", folder)
    first = reader.snapshot()
    assert reader.snapshot() is first
    store = RunStore(folder)
    store.commit([], [closed_round("shops", 3, 3, ["device-0000", "device-0001"])])
    second = reader.snapshot()
    assert (second.took_part, second.trained) == ({"device-0001": 3, "device-0002": 2}, 3)
    assert rows(second)[0].took_part == "0 of 3"
    assert [summary.round for summary, _ in second.closed] == [1, 2, 3]
    assert second.closed[0] is first.closed[0]
    observations = Observations(folder)
    observations.save(ServerView(seen=first.server.seen + 5 if first.server else 0), {"new": status("new")})
    third = reader.snapshot()
    assert set(third.devices) == {*first.devices, "new"}
    assert third.devices["device-0000"] is first.devices["device-0000"]
    Operations(folder).add(Operation(action=Action.PAUSE))
    assert [each.action for each in reader.snapshot().waiting] == [Action.PAUSE]


def test_another_run_in_the_same_folder_is_shown_from_its_start(
    vit: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "FRESH_SECONDS", 0.0)
    folder = stored_run(tmp_path / "shops", vit, devices=3, rounds=4)
    reader = RunReader("k", folder)
    origin = reader.snapshot().origin
    shutil.rmtree(folder)
    RunStore.create(folder, origin.model_copy(update={"session": "other"}), vit.bundle.task)
    after = reader.snapshot()
    assert (after.origin.session, after.closed, after.devices) == ("other", [], {})


def test_a_damaged_file_of_observations_is_begun_anew(tmp_path: Path) -> None:
    (tmp_path / "observations.sqlite").write_text("no database")
    observations, view = Observations(tmp_path), ServerView(seen=1.0)
    observations.save(view, {"a": status("a")})
    observations._next = 0.0
    observations.save(view, {"a": status("a")})
    assert read_observations(tmp_path) == (view, {"a": DeviceView(status=status("a"))})
    observations.close()


def test_an_operation_that_cannot_be_opened_now_is_kept(tmp_path: Path) -> None:
    operations = Operations(tmp_path)
    operations.add(Operation(action=Action.PAUSE))
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
    try:
        assert operations.waiting() == []
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert [each and each.action for _, each in operations.waiting()] == [Action.PAUSE]


def test_observations_are_written_at_most_once_a_second_and_only_changes(tmp_path: Path) -> None:
    observations = Observations(tmp_path)
    one, view = status("a"), ServerView(seen=100.0)
    observations.save(view, {"a": one})
    observations.heartbeat(Health(device="a", time=1, started=0, activity=Activity.WAITING), 101.0)
    observations.save(ServerView(seen=101.0), {"a": one})  # too soon
    assert read_observations(tmp_path) == (view, {"a": DeviceView(status=one)})
    observations._next = 0.0
    observations.save(ServerView(seen=102.0), {"a": one})
    server, devices = read_observations(tmp_path, since=101.0)
    assert server == ServerView(seen=102.0)
    assert devices["a"].heard == 101.0
    assert read_observations(tmp_path, since=103.0)[1] == {}
    observations._next = 0.0
    observations.save(ServerView(seen=104.0), {"b": status("b")})  # the run has forgotten the other device
    assert read_observations(tmp_path)[1].keys() == {"b"}
    observations.close()
    (tmp_path / "observations.sqlite").write_text("no database")
    assert read_observations(tmp_path) == (None, {})


def test_an_operation_in_the_log_is_read_again(vit: Built, tmp_path: Path) -> None:
    folder = stored_run(tmp_path / "shops", vit, devices=1, rounds=1)
    event = OperatorActed(Operation(action=Action.DEADLINE, seconds=30.0, by="::1"))
    RunStore(folder).commit([LoggedEvent(1.0, event)])
    assert [logged.event for logged in RunStore(folder).events()] == [event]
