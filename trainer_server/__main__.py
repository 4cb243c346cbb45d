"""python -m trainer_server: coordinates a federated run. Its commands are in `trainer_server.commands`."""

from __future__ import annotations

from fedfmsl.common.lazy_group import commands_in, lazy_group

COMMANDS = {
    "start": "Coordinate one run until it is finished. The same command resumes an interrupted run.",
    "resume": "Resume an interrupted run with its stored configuration.",
    "console": "Serve the operator's console for the runs in a folder: running, interrupted and finished ones.",
    "purge": "Remove everything that a run has left on the broker: its retained messages, and devices in Home "
    "Assistant.",
    "status": "Show the present round, its missing devices, and refused messages.",
    "rounds": "List the closed rounds.",
    "export": "Write the current global expert as a PEFT adapter. Works also while the server runs.",
    "replay": "Recompute a run from its event log and compare every round, bit by bit. Needs a run with --audit.",
    "rollback": "Return a run, in progress or finished, to the global expert that an earlier round has made.",
    "classes": "List the classes that devices propose to a run, add classes to it, or withdraw them before they are "
    "added.",
}
app = lazy_group(
    "Coordinate a federated run: both stages of FedFMSL, over MQTT.",
    commands_in("trainer_server.commands", "server", COMMANDS),
)

if __name__ == "__main__":
    app()
