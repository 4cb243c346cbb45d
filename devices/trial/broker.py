"""python -m devices.trial.broker: an amqtt broker on this machine, for trials and tests. Deployments use mosquitto."""

from __future__ import annotations

import asyncio
import logging
import signal

import typer
from amqtt.broker import Broker

from fedfmsl.common.cli import application
from fedfmsl.errors import RunError
from fedfmsl.transport.link import KEEPALIVE_SECONDS
from fedfmsl.transport.listening import why_not_listening

app = application()


@app.command()
def broker(
    port: int = typer.Option(1883, min=1, max=65535),
    bind: str = typer.Option(
        "127.0.0.1", help="Address to listen on. The broker accepts every client, so keep it on loopback."
    ),
) -> None:
    """Run a small MQTT broker (amqtt, MQTT 3.1.1) until interrupted."""
    logging.disable(logging.ERROR)
    asyncio.run(_serve(bind, port))


async def _serve(bind: str, port: int) -> None:
    address = f"{bind}:{port}"
    config = {
        "listeners": {"default": {"type": "tcp", "bind": address, "max_connections": 0}},
        "timeout_disconnect_delay": KEEPALIVE_SECONDS // 2,  # MQTT allows a client 1.5 times its keepalive
        "plugins": {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}},
    }
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    instance = Broker(config)
    try:
        await instance.start()
    except Exception as error:  # amqtt raises exceptions of several types
        why = why_not_listening(bind, error.__cause__) if isinstance(error.__cause__, OSError) else error
        raise RunError(f"cannot start a broker on {address} ({why}); choose another --port") from error
    print(f"broker on mqtt://{address}", flush=True)
    await stop.wait()
    await instance.shutdown()


if __name__ == "__main__":
    app()
