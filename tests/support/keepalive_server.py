"""python tests/support/keepalive_server.py SECONDS trainer_server start ARGUMENTS…

The server of `python -m trainer_server start` with another MQTT keepalive, so that a test soon sees a dead connection
noticed.
"""

from __future__ import annotations

import sys

from fedfmsl.common.cli import application
from fedfmsl.common.logs import set_up_logging
from fedfmsl.common.options import with_settings
from fedfmsl.protocol.task_bundle import TaskBundle
from trainer_server.service.lifecycle import open_run, run_server
from trainer_server.settings import ServerSettings


def launcher(keepalive: int) -> tuple[str, ...]:
    """For `Simulation.start_server`."""
    return (__file__, str(keepalive))


def main(keepalive: int) -> None:
    app = application("")

    @app.command()
    @with_settings(ServerSettings)
    def start(settings: ServerSettings) -> None:
        set_up_logging()
        bundle = TaskBundle.load(settings.bundle)
        store = open_run(settings.folder, settings.run_config(bundle), bundle)
        run_server(store, bundle, settings.broker, "", settings.identity, settings.insecure, keepalive=keepalive)

    app(sys.argv[4:])


if __name__ == "__main__":
    main(int(sys.argv[1]))
