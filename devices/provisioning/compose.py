"""The kit's compose file: broker and server on one machine."""

from __future__ import annotations

import ipaddress
import json
from pathlib import Path

from devices.provisioning.broker_kit import CONNECTIONS
from fedfmsl.protocol.topics import ROOT
from fedfmsl.transport.address import PORTS, netloc

OWNER = 1883  # the user of the image eclipse-mosquitto; devices/Dockerfile uses the same
_STATE, _BUNDLE, _IDENTITY = "/var/lib/fedfmsl", "/bundle", "/run/server.pem"
_REVOKED = "/run/revoked.crl"  # where the server finds the revocation list, beside its identity


def compose_yaml(
    folder: Path, host: str, run: str | None, source: Path, prefix: str = ROOT, port: int = PORTS["mqtts"]
) -> str:
    """For the kit in `folder`. Clients reach broker and server at `host`. The server's image is built from `source`.

    If `host` is a name, the containers have a network of their own, where it is the broker's name: the server reaches
    the broker under the name in its certificate. If it is an address, both use the machine's network.
    """
    command = ["start", "--run", f"${{RUN:-{run}}}" if run else "${RUN:?name of the run}"]
    command += ["--devices", "${DEVICES:?number of devices}", "--bundle", _BUNDLE, "--out", _STATE]
    location = netloc(host) if port == PORTS["mqtts"] else f"{netloc(host)}:{port}"
    command += ["--identity", _IDENTITY, "--broker", f"mqtts://{location}", "--serve", f"{netloc(host)}:8443"]
    command += [] if prefix == ROOT else ["--topic-prefix", prefix]
    named = not _is_address(host)
    machine = "network_mode: host"
    broker = (
        f'ports: ["{port}:{port}"]\n    networks: {{default: {{aliases: [{_quoted(host)}]}}}}' if named else machine
    )
    server = 'ports: ["8443:8443"]' if named else machine
    return f"""\
# Written by devices.provision:
#   chown -R {OWNER}:{OWNER} . ../server.pem     # the images' user must own the keys
#   printf 'DEVICES=3\\nBUNDLE=/path/of/bundle\\n' > .env     # read by every command of docker compose
#   docker compose up --detach
# To start only the broker, without ../server.pem: docker compose up --detach broker

services:
  broker:
    image: eclipse-mosquitto:2
    command: [mosquitto, -c, {_quoted(f"{folder}/mosquitto.conf")}]
    user: "{OWNER}:{OWNER}"
    volumes:
      - {{type: bind, source: ., target: {_quoted(str(folder))}}}
    {broker}
    ulimits: {{nofile: {2 * CONNECTIONS}}}
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
      # not the whole folder, which holds the broker's key; restart the server after a revocation, as the broker
      - {{type: bind, source: ./revoked.crl, target: {_REVOKED}, read_only: true}}
      - {{type: bind, source: "${{BUNDLE:?folder of the bundle}}", target: {_BUNDLE}, read_only: true}}
      - {{type: volume, source: run, target: {_STATE}}}
    {server}
    environment: [FEDFMSL_USER, FEDFMSL_PASSWORD]  # of a broker with passwords
    depends_on: [broker]
    cap_drop: [ALL]
    security_opt: ["no-new-privileges:true"]
    restart: on-failure  # the server exits when its run is finished

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
    """A YAML string without compose variables. The value of `variable` overrides it."""
    plain = text.replace("$", "$$")
    return json.dumps(f"${{{variable}:-{plain}}}" if variable else plain)
