"""The commands that tell about a run. They only read, and disturb no server at work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer
from rich.table import Table

from fedfmsl.algorithms.accounting import epsilon
from fedfmsl.common.cli import console
from fedfmsl.errors import ConfigError, RunError
from fedfmsl.protocol.messages import Stage
from trainer_server.coordinator.state import TRAINING
from trainer_server.service.lifecycle import make_plan, open_bundle, replay_rounds
from trainer_server.storage.peft_adapter import write_adapter
from trainer_server.storage.run_store import RunStore

OUT = typer.Option(help="Folder of the run.")


def status(out: Path = OUT, as_json: bool = typer.Option(False, "--json", help="One JSON object.")) -> None:
    """Show where a run stands: also while its server is at work."""
    store = RunStore(out)
    config = store.origin.config
    kept = store.checkpoint()
    announced = kept[0].announced if kept else None
    closed = store.rounds()
    facts: dict[str, Any] = {
        "run": config.run,
        "session": store.origin.session,
        "ended": store.ended or "",
        "round": announced.round if announced else 0,
        "stage": announced.stage.value if announced else "gathering devices",
        "index": announced.index + 1 if announced else 0,
        "of": announced.of if announced else 0,
        "level": announced.level if announced else 0,
        "asked": kept[0].expected if kept else [],
        "answered": sorted(store.pending_updates()),
        "closed rounds": len(closed),
        "repeated": [r.repeated for r in closed if r.repeated],
        "refused": {f"{r.device}: {r.kind}": r.count for r in store.refusals()},
    }
    if config.privacy:
        noised = [r for r in closed if r.round.stage in (Stage.STATISTICS, *TRAINING) and not r.repeated]
        facts["epsilon"] = epsilon(config.privacy, len(noised), config.delta)
        facts["delta"] = config.delta
    if as_json:
        print(json.dumps(facts))
        return
    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        table.add_row(name, _shown(value))
    console.print(table)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {count}×" for name, count in value.items()) or "nothing"
    if isinstance(value, list):
        return f"{len(value)}" + (f": {', '.join(map(str, value[:10]))}" if value else "")
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def rounds(out: Path = OUT, as_json: bool = typer.Option(False, "--json", help="One JSON object per round.")) -> None:
    """List the closed rounds."""
    closed = RunStore(out).rounds()
    if as_json:
        for one in closed:
            print(one.model_dump_json())
        return
    table = Table("round", "stage", "level", "updates", "missing", "seconds", "KB up", "remarks", box=None)
    for one in closed:
        said = one.round
        table.add_row(
            str(said.round),
            f"{said.stage.value} {said.index + 1}/{said.of}",
            str(said.level),
            str(len(one.updates)),
            str(len(one.missing)),
            f"{one.seconds:.1f}",
            f"{sum(one.bytes_up.values()) / 1e3:.0f}",
            one.repeated,
        )
    console.print(table)


def export(out: Path = OUT, to: Path = typer.Option(help="Folder to write the PEFT adapter to.")) -> None:
    """Write the global expert as it stands as a PEFT adapter: at any time, also while the server is at work."""
    store = RunStore(out)
    bundle = open_bundle(store)
    kept = store.state()
    if kept is None or not kept[0].start.size:
        raise RunError(f"{out} has no global expert yet: its first round has not been closed")
    state = kept[0]
    try:
        write_adapter(bundle, state.expert[: bundle.expert.size(state.sal.level)], state.sal.level, to)
    except OSError as error:
        raise ConfigError(f"--to {to} cannot be written ({error.strerror}); choose another folder") from error
    print(to)


def replay(out: Path = OUT) -> None:
    """Do a run over from its log alone and compare every round bit by bit (needs --audit at the start)."""
    store = RunStore(out)
    bundle = open_bundle(store)
    recorded = {closed.round.round: closed.round for closed in store.rounds()}
    done = 0
    for announced in replay_rounds(store, make_plan(store, bundle)):
        done += 1
        if announced.round in recorded and announced != recorded[announced.round]:
            raise RunError(f"round {announced.round} comes out otherwise than it was recorded; has {out} been altered?")
    console.print(f"{done} rounds done over, {len(recorded)} of them compared: every bit as recorded")
