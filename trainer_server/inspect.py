"""Commands that show, export and replay a run. They do not change the run and work also while its server runs."""

from __future__ import annotations

import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import typer

from fedfmsl.algorithms.accounting import Observer
from fedfmsl.common.cli import print_json
from fedfmsl.common.whole_folder import check_own, write_folder
from fedfmsl.errors import ConfigError, RunError
from fedfmsl.protocol.messages import DeviceStatus
from fedfmsl.transport.identity import describe_expiry
from trainer_server.coordinator.privacy_budget import NoisedRounds, privacy_budget
from trainer_server.coordinator.proposals import Proposal, proposals
from trainer_server.coordinator.records import NAMES, listed, rare_devices
from trainer_server.coordinator.refusals import LEFT_OUT_AFTER, is_left_out, left_out_of_sums
from trainer_server.service.lifecycle import make_plan, open_bundle, replay_rounds
from trainer_server.service.run_log import PAUSED
from trainer_server.storage.expert_folder import expert_files, last_result
from trainer_server.storage.kept_experts import KeptExperts
from trainer_server.storage.observations import read_observations
from trainer_server.storage.run_status import paused_and_excluded, server_process, sizes_of
from trainer_server.storage.run_store import RunStore

WHO = {
    Observer.PUBLIC: "everybody",
    Observer.PARTICIPANT: "another device",
    Observer.SERVER: "the server",
    Observer.COLLUDERS: "the server with one device",
}
OUT = typer.Option(help="Folder of the run.", readable=False)  # `RunStore` says who may read it


def status(out: Path = OUT, as_json: bool = typer.Option(False, "--json", help="One JSON object.")) -> None:
    """Show the present round, its missing devices, and refused messages."""
    from rich.table import Table

    from fedfmsl.common.cli import console

    facts = _facts(RunStore(out))
    if as_json:
        print_json(facts)
        return
    table = Table(show_header=False, box=None)
    for label, text in _rows(facts).items():
        table.add_row(label, text)
    console.print(table)


def _facts(store: RunStore) -> dict[str, Any]:
    config = store.origin.config
    checkpoint = store.checkpoint()
    announced = checkpoint[0].announced if checkpoint else None
    closed = store.rounds.counts()
    since, reason = store.files.outage()
    paused, excluded = paused_and_excluded(store)
    facts: dict[str, Any] = {"run": config.run, "session": store.origin.session, "server": vars(server_process(store))}
    if store.origin.start is not None:
        facts["goes_on_from"] = store.origin.start.text
        facts |= {"not_counted": text} if (text := store.origin.uncounted) else {}
    if store.ended is None:
        view, _ = read_observations(store.folder)
        facts |= {"paused": True} if paused else {}
        facts |= {"rests": view.rests} if view and view.rests and not paused else {}
        facts |= {"waits": view.waits} if view and view.waits and not paused else {}
        facts |= {"adds": list(view.adds)} if view and view.adds else {}
    facts |= {"excluded": sorted(excluded)} if excluded else {}
    task = store.task()
    facts |= {"classes": len(task.classes), "classes_version": task.version}
    if store.ended is None:
        statuses = _statuses(store)
        if found := proposals(task.classes, statuses.values(), excluded):
            facts["proposed_classes"] = {each.name: len(each.devices) for each in found}
        unable = {name: each.error for name, each in sorted(statuses.items()) if each.error and name not in excluded}
        facts |= {"cannot_take_part": unable} if unable else {}
    if store.ended is not None:
        facts["ended"] = store.ended
    elif checkpoint is None or announced is None:
        facts |= {"online": store.files.joined(), "devices": config.devices}
    else:
        selected, answered = checkpoint[0].expected, sorted(store.pending_updates())
        facts |= {
            "round": announced.round,
            "stage": announced.stage.value,
            "stage_round": announced.ordinal[0],
            "stage_rounds": announced.ordinal[1],
            "level": announced.level,
            "selected": selected,
            "answered": answered,
            "missing": sorted(set(selected) - set(answered) - excluded),
        }
        left_out = {name: one.until for name, one in checkpoint[0].refused.items() if is_left_out(one, announced.round)}
        facts |= {"left_out": left_out} if left_out else {}
        silent = left_out_of_sums(checkpoint[0].silent, announced.round)
        facts |= {"left_out_of_sums": silent} if silent else {}
    if kept := KeptExperts(store.folder).rounds():
        facts["rollback_to"] = kept
    if rejected := store.rounds.rejections():
        facts["rejected"] = {str(number): why for number, why in rejected.items()}
    if since and store.ended is None:
        facts["broker"] = (
            f"no connection since {datetime.fromtimestamp(since).isoformat(' ', 'seconds')} because: {reason}"
        )
    counts, trained = store.rounds.participation()
    known = [status.device for status in checkpoint[0].devices] if checkpoint else []
    if rare := rare_devices(counts, trained, known, config.fraction):
        facts |= {"training_rounds": trained, "rarely_took_part": rare}
    if until := store.files.certificates():
        facts["certificates_until"] = until
    facts["bytes"] = sizes_of(store)
    facts |= {
        "closed_rounds": sum(closed.values()),
        "repeated": store.rounds.repetitions(),
        "refused": {f"{r.device}: {r.kind}": r.count for r in store.refusals.all()},
    }
    if config.privacy:
        is_answered = bool(store.pending_updates())
        facts["epsilon"] = privacy_budget(
            config, NoisedRounds.of(closed, store.origin.spent_before), announced, is_answered
        )
        facts["delta"] = config.delta
    return facts


def proposed_classes(store: RunStore) -> list[Proposal]:
    """What devices propose with their latest statuses."""
    _, excluded = paused_and_excluded(store)
    return proposals(store.task().classes, _statuses(store).values(), excluded)


def _statuses(store: RunStore) -> dict[str, DeviceStatus]:
    """The latest status of each device."""
    checkpoint = store.checkpoint()
    statuses = {status.device: status for status in checkpoint[0].devices} if checkpoint else {}
    _, seen = read_observations(store.folder)
    return statuses | {name: view.status for name, view in seen.items() if view.status}


def _rows(facts: dict[str, Any]) -> dict[str, str]:
    """The facts as text, by label."""
    rows = {name.replace("_", " "): _text(value) for name, value in facts.items()}
    rows["server"] = _server_text(facts["server"], facts.get("ended"))
    if "paused" in facts:
        rows["paused"] = PAUSED
    if "online" in facts:
        online, devices = facts["online"], rows.pop("devices")
        names = f": {', '.join(online[:NAMES])}" if online else ""
        rows["online"] = f"{len(online)} of {devices} devices{names}"
    if until := facts.get("certificates_until"):
        now = time.time()
        texts = [f"{name} {describe_expiry(moment, now, name)[0]}" for name, moment in until.items()]
        rows["certificates"] = "; ".join(texts)
        del rows["certificates until"]
    if "epsilon" in facts:
        del rows["epsilon"]
        delta = rows.pop("delta")
        for name, value in facts["epsilon"].items():
            rows[f"ε for {WHO[Observer(name)]}"] = f"{value:.3g} at δ = {delta}"
    else:
        rows["privacy"] = "none was asked for (--dp-noise)"
    rows["storage"] = ", ".join(f"{what} {size / 1e6:.1f} MB" for what, size in facts["bytes"].items())
    del rows["bytes"]
    if "stage" in facts:
        rows["stage"] = f"{facts['stage']}, round {rows.pop('stage round')} of {rows.pop('stage rounds')}"
    rows["classes"] += f", version {rows.pop('classes version')}"
    if "proposed_classes" in facts:
        texts = [f"{name} by {count} device{'s' * (count > 1)}" for name, count in facts["proposed_classes"].items()]
        rows["proposed classes"] = f"{listed(texts)}; add them with python -m trainer_server classes"
    if "cannot_take_part" in facts:
        rows["cannot take part"] = listed([f"{name} ({why})" for name, why in facts["cannot_take_part"].items()])
    if "rollback_to" in facts:
        rows["rollback to"] = f"round {', '.join(map(str, facts['rollback_to']))}"
    if "rejected" in facts:
        rows["rejected"] = "; ".join(f"in round {number}: {why}" for number, why in facts["rejected"].items())
    if "left_out" in facts:
        until = [f"{name} until round {round_}" for name, round_ in facts["left_out"].items()]
        rows["left out"] = f"{listed(until)}; {LEFT_OUT_AFTER} updates in a row were refused"
    if "left_out_of_sums" in facts:
        until = [f"{name} until round {round_}" for name, round_ in facts["left_out_of_sums"].items()]
        rows["left out of sums"] = f"{listed(until)}; without an answer in a secure sum"
    if "rarely_took_part" in facts:
        rare = [f"{name} {count}×" for name, count in facts["rarely_took_part"].items()]
        rows["rarely took part"] = f"{listed(rare)}, of {rows.pop('training rounds')} training rounds"
    return rows


def _server_text(server: dict[str, Any], ended: str | None) -> str:
    """Whether a server runs in the folder, and when it stored its last event."""
    age = timedelta(seconds=max(round(time.time() - server["last_event"]), 0))
    last = f"last event {age} ago" if server["last_event"] else "no event yet"
    if server["runs"]:
        return f"runs as process {server['pid'] or 'unknown'}, {last}"
    if server["runs"] is None and server["last_event"]:
        return f"unknown, because this user may not read the lock of the run; {last}"
    remedy = "" if ended else "; start it again with the same command"
    return f"does not run, {last}{remedy}"


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {count}×" for name, count in value.items()) or "nothing"
    if isinstance(value, list):
        return f"{len(value)}" + (f": {', '.join(map(str, value[:NAMES]))}" if value else "")
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def rounds(out: Path = OUT, as_json: bool = typer.Option(False, "--json", help="One JSON object per round.")) -> None:
    """List the closed rounds."""
    from rich.table import Table

    from fedfmsl.common.cli import console

    closed = RunStore(out).rounds.all()
    if as_json:
        for record in closed:
            print_json(record.model_dump(mode="json"))
        return
    table = Table("round", "stage", "level", "updates", "missing", "seconds", "KB up", "repeated", box=None)
    for record in closed:
        announced = record.round
        table.add_row(
            str(announced.round),
            f"{announced.stage.value} {announced.ordinal[0]}/{announced.ordinal[1]}",
            str(announced.level),
            str(len(record.updates)),
            listed(record.missing),
            f"{record.seconds:.1f}",
            f"{sum(record.bytes_up.values()) / 1e3:.0f}",
            record.repeated,
        )
    console.print(table)


def export(out: Path = OUT, to: Path = typer.Option(help="Folder to write the PEFT adapter to.")) -> None:
    """Write the current global expert as a PEFT adapter. Works also while the server runs."""
    store = RunStore(out)
    bundle = open_bundle(store)
    checkpoint = store.state()
    if checkpoint is None or not checkpoint[0].start.size:
        raise RunError(f"{out} has no global expert yet: its first round is not closed; try again later")
    state = checkpoint[0]
    files = expert_files(bundle, store.origin.config, state.expert, state.sal.level, last_result(store))
    check_own("--to", to, files)
    try:
        write_folder(to, files)
    except OSError as error:
        raise ConfigError(f"--to {to} cannot be written ({error.strerror}); choose another folder") from error
    print(to)


def replay(out: Path = OUT) -> None:
    """Recompute a run from its event log and compare every round, bit by bit. Needs a run with --audit."""
    from fedfmsl.common.cli import console

    store = RunStore(out)
    bundle = open_bundle(store)
    recorded = {closed.round.round: closed.round for closed in store.rounds.all()}
    replayed = set()
    for announced in replay_rounds(store, make_plan(store, bundle)):
        replayed.add(announced.round)
        if announced.round in recorded and announced != recorded[announced.round]:
            raise RunError(f"round {announced.round} differs from its record; was {out} altered?")
    first = store.first_state()
    begin = first[0].round if first else 0
    logged = {number for number, each in recorded.items() if each.session == store.origin.session and number > begin}
    if missing := sorted(logged - replayed):
        raise RunError(f"round {missing[0]} has a record, but does not follow from the event log; was {out} altered?")
    if not recorded:
        console.print("no closed rounds to compare yet")
        return
    closed = len(replayed & recorded.keys())
    console.print(f"{len(replayed)} announced rounds replayed; the {closed} closed ones equal their records")
