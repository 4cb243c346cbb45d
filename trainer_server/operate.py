"""Commands that ask the server of a run for an action. The server carries it out and logs it; one that does not run
does so when it is started again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from fedfmsl.common.cli import print_json
from fedfmsl.errors import ConfigError, RunError
from fedfmsl.protocol.class_names import check_names, describe_classes, normal_form, split_names
from fedfmsl.protocol.messages import MAX_ADDED
from trainer_server.coordinator.operator import Action, Operation, classes_to_add
from trainer_server.coordinator.proposals import Proposal, why_not_new
from trainer_server.coordinator.records import listed
from trainer_server.inspect import OUT, proposed_classes
from trainer_server.service.loop import FINISHED
from trainer_server.storage.kept_experts import KeptExperts
from trainer_server.storage.observations import read_observations
from trainer_server.storage.operations import Operations
from trainer_server.storage.run_status import server_process
from trainer_server.storage.run_store import RunStore

if TYPE_CHECKING:
    from rich.table import Table

NOW = "now"
SHOWN = 100  # proposed classes in the table


def rollback(
    number: int = typer.Argument(min=1, metavar="ROUND", help="Closed round whose global expert the run returns to."),
    out: Path = OUT,
) -> None:
    """Return a run, in progress or finished, to the global expert that an earlier round has made.

    The updates of the present round do not count. After stage 1, stage 2 begins again, with new local experts. The
    server carries it out and logs it; a server that does not run does so when it is started again.
    """
    from fedfmsl.common.cli import console

    store = RunStore(out)
    kept = KeptExperts(out).rounds()
    if store.ended not in (None, FINISHED):
        raise RunError(f"the run at {out} has failed ({store.ended}), so it cannot go on; start a new run")
    if store.ended == FINISHED and store.origin.config.secure:
        raise RunError(
            f"the run at {out} is finished, and with --secure devices send no update of stage 2 again; start a new run "
            f"with --from {out}"
        )
    if number not in kept:
        raise ConfigError(
            f"the global expert of round {number} is not kept; those of these rounds are: {', '.join(map(str, kept))}"
            if kept
            else f"{out} keeps no global expert yet: no round that makes one is closed"
        )
    when = _ask(store, Operation(action=Action.ROLLBACK, round=number, by="the command line"))
    console.print(f"run {store.origin.config.run!r} returns to the global expert of round {number} {when}")


def classes(
    out: Path = OUT,
    add: str | None = typer.Option(None, metavar="NAME,NAME", help="Add these classes to the run in progress."),
    withdraw: str | None = typer.Option(
        None, metavar="NAME,NAME", help="Do not add these classes, which --add has named in the present round."
    ),
    as_json: bool = typer.Option(False, "--json", help="One JSON object."),
) -> None:
    """List the classes that devices propose to a run, add classes to it, or withdraw them before they are added.

    A device proposes a class that it has labelled samples of. The present round closes, then the run goes on with the
    added classes: devices that have samples of them train them. No device is restarted, and no bundle is downloaded.
    """
    from fedfmsl.common.cli import console

    store = RunStore(out)
    run, task, found = store.origin.config.run, store.task(), proposed_classes(store)
    pending = _pending(store)
    if add is None and withdraw is None:
        if as_json:
            proposed = [vars(each) for each in found]
            print_json({"classes": task.classes, "version": task.version, "proposed": proposed, "to_add": pending})
            return
        console.print(f"run {run!r} has {describe_classes(task.classes)}")
        if pending:
            console.print(f"added after the present round: {listed(pending)}")
        console.print(_table(found) if found else "no device proposes another class")
        return
    if add is not None and withdraw is not None:
        raise ConfigError("--add and --withdraw are two commands; give one of them")
    if withdraw is not None:
        _withdraw(store, pending, withdraw)
        return
    names = _checked(task.classes, pending, add or "")
    if store.ended is not None:
        raise RunError(f"the run at {out} has ended ({store.ended}); start a new run with --from {out}")
    when = _ask(store, Operation(action=Action.CLASSES, classes=names, by="the command line"))
    if unknown := sorted({*names} - {each.name for each in found}):
        console.print(
            f"warning: no device proposes {listed(unknown)}; check the spelling, a class is never removed within a run"
        )
    later = "" if when == NOW else f", {when}"
    console.print(f"run {run!r} adds {listed(names)} after its present round{later}")


def _withdraw(store: RunStore, pending: Sequence[str], text: str) -> None:
    from fedfmsl.common.cli import console

    names = tuple(dict.fromkeys(map(normal_form, split_names(text))))
    if not names:
        raise ConfigError("--withdraw names no class; write it like --withdraw apple,pear")
    if unknown := [name for name in names if name not in pending]:
        waiting = f"these do: {listed(pending)}" if pending else "none does"
        raise ConfigError(
            f"--withdraw: {listed(unknown)} does not wait to be added, {waiting}; a class of the run is never removed"
        )
    if len(names) > MAX_ADDED:
        raise ConfigError(f"--withdraw has {len(names)} names, more than {MAX_ADDED}; withdraw the others later")
    when = _ask(store, Operation(action=Action.WITHDRAW, classes=names, by="the command line"))
    later = "" if when == NOW else f", {when}"
    console.print(f"run {store.origin.config.run!r} does not add {listed(names)}{later}")


def _ask(store: RunStore, operation: Operation) -> str:
    """Asks the server, and returns when it acts."""
    try:
        if not Operations(store.folder).add(operation):
            raise RunError(f"too many actions wait for the server of {store.folder}; is it running?")
    except OSError as error:
        raise ConfigError(
            f"{store.folder} cannot be written ({error.strerror}); run the command as the server's user"
        ) from error
    runs = store.ended is None and server_process(store).runs
    return NOW if runs else "when its server is started again: python -m trainer_server resume with its --broker"


def _pending(store: RunStore) -> tuple[str, ...]:
    """The classes that are added after the present round, also those that the server has not read yet."""
    view, _ = read_observations(store.folder)
    waiting = [operation for _, operation in Operations(store.folder).waiting() if operation]
    return classes_to_add(view.adds if view else (), waiting)


def _checked(present: Sequence[str], pending: Sequence[str], text: str) -> tuple[str, ...]:
    """The names in a line of CSV, in NFC. Raises ConfigError unless they can be added to the `present` and `pending`
    classes."""
    names = [normal_form(name) for name in split_names(text)]
    if not names:
        raise ConfigError("--add names no class; write it like --add apple,pear")
    if why := why_not_new(names, present, pending):
        raise ConfigError(f"--add: {why}")
    if len(names) > MAX_ADDED:
        raise ConfigError(f"--add has {len(names)} names, more than {MAX_ADDED}; add the others later")
    return check_names([*present, *names], "--add")[len(present) :]


def _table(found: Sequence[Proposal]) -> Table:
    from rich.table import Table

    table = Table("proposed class", "devices", "samples", "by", box=None)
    for each in found[:SHOWN]:
        table.add_row(each.name, str(len(each.devices)), str(each.samples), listed(each.devices))
    if (more := len(found) - SHOWN) > 0:
        table.add_row(f"and {more} more")
    return table
