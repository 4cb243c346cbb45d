"""A compose file for the broker's kit: the broker and the run's server on one machine, by `docker compose up`."""

from __future__ import annotations

import ipaddress
import json
from pathlib import Path

from fedfmsl.transport.address import netloc

OWNER = 1883  # the user of the image eclipse-mosquitto; devices/Dockerfile gives the server the same
_STATE, _BUNDLE, _IDENTITY = "/var/lib/fedfmsl", "/bundle", "/run/server.pem"


def compose_yaml(folder: Path, host: str, run: str | None, source: Path) -> str:
    """For a kit that lies in `folder`, of a broker and a server that are reached by `host`; the server's image is built
    from this project's `source`.

    Both share one network address, which a `host` that is a name means inside as well: so the server finds the broker,
    and listens, by the name that their certificates are of. An address is only the machine's own.
    """
    command = ["start", "--run", f"${{RUN:-{run}}}" if run else "${RUN:?the name of the run}"]
    command += ["--devices", "${DEVICES:?how many there are}", "--bundle", _BUNDLE, "--out", _STATE]
    command += ["--identity", _IDENTITY, "--broker", f"mqtts://{netloc(host)}", "--serve", f"{netloc(host)}:8443"]
    named = not _is_address(host)
    network = f'hostname: {_quoted(host)}\n    ports: ["8883:8883", "8443:8443"]' if named else "network_mode: host"
    return f"""\
# Written by devices.provision:
#   chown -R {OWNER}:{OWNER} . ../server.pem     # the images' user, who alone may read the keys
#   DEVICES=2 BUNDLE=/path/of/bundle docker compose up --detach
# Without ../server.pem there is only a broker here: docker compose up --detach broker

services:
  broker:
    image: eclipse-mosquitto:2
    command: [mosquitto, -c, {_quoted(f"{folder}/mosquitto.conf")}]
    user: "{OWNER}:{OWNER}"
    volumes:
      - {{type: bind, source: ., target: {_quoted(str(folder))}}}
    {network}
    cap_drop: [ALL]
    security_opt: ["no-new-privileges:true"]
    restart: unless-stopped

  server:
    build:
      context: {_quoted(str(source), "FEDFMSL_SOURCE")}
      dockerfile: devices/Dockerfile
      target: server
    command: {json.dumps(command)}
    volumes:
      - {{type: bind, source: ../server.pem, target: {_IDENTITY}, read_only: true}}
      - {{type: bind, source: "${{BUNDLE:?the folder of the bundle}}", target: {_BUNDLE}, read_only: true}}
      - {{type: volume, source: run, target: {_STATE}}}
    network_mode: {"service:broker" if named else "host"}
    environment: [FEDFMSL_USER, FEDFMSL_PASSWORD]  # of a broker that asks for them
    depends_on: [broker]
    cap_drop: [ALL]
    security_opt: ["no-new-privileges:true"]
    restart: on-failure  # it ends by itself with its run

volumes:
  run: {{}}
"""


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _quoted(text: str, variable: str = "") -> str:
    """A string of YAML in which compose finds no variable, but perhaps one to be taken instead."""
    plain = text.replace("$", "$$")
    return json.dumps(f"${{{variable}:-{plain}}}" if variable else plain)
