"""Texts of the configuration files of a mosquitto (2.0 or newer) that only members of a fleet may use."""

from __future__ import annotations

import base64
import hashlib
import secrets
import shlex
from pathlib import Path

from fedfmsl.transport.address import PORTS
from fedfmsl.transport.settings import HOME_ASSISTANT, OPERATOR_NAME, SERVER_NAME  # also common names or user names

# PBKDF2 iterations, mosquitto's own default. The passwords are long and random, so more iterations would only slow the
# broker down when a fleet reconnects: it computes them in its single thread.
_ROUNDS = 101
_SALT_BYTES = 12
_PASSWORD_BYTES = 24

QUEUED_BYTES = 800_000_000  # of messages that wait for one client
MEMORY_BYTES = 2_000_000_000  # of the broker
CONNECTIONS = 5000  # 2,500 devices, and as many that have no login yet


def acl(prefix: str) -> str:
    """The access control list for topics below `prefix`. Everything else is forbidden.

    mosquitto accepts every subscription, also with wildcards, and checks the list for each message that it delivers.
    """
    return f"""\
# Written by devices.provision. Everything that this file does not allow is forbidden.
# %u is the common name of the client's certificate, or its user name.

# A device writes its own topics,
pattern write {prefix}/+/devices/%u/status
pattern write {prefix}/+/devices/%u/progress
pattern write {prefix}/+/devices/%u/update/#
pattern write {prefix}/+/devices/%u/health
pattern write {prefix}/+/devices/%u/prediction
pattern write {prefix}/+/devices/%u/prediction/status
# sends itself a large message (edge_runtime check),
pattern readwrite {prefix}/+/devices/%u/check
# and reads the topics of the server and its own acknowledgements.
pattern read {prefix}/+/devices/%u/status
pattern read {prefix}/+/devices/%u/ack
pattern read {prefix}/+/server/status
pattern read {prefix}/+/round
pattern read {prefix}/+/globals/#
# It announces itself to Home Assistant under its own name (the first level is its setting home_assistant).
pattern write {HOME_ASSISTANT}/device/+/%u/config

# Home Assistant reads announcements, health and predictions of devices, and writes its own status.
user {HOME_ASSISTANT}
topic read {HOME_ASSISTANT}/#
topic write {HOME_ASSISTANT}/status
topic read {prefix}/+/devices/+/status
topic read {prefix}/+/devices/+/health
topic read {prefix}/+/devices/+/prediction
topic read {prefix}/+/devices/+/prediction/status

# The server reads and writes all topics. A second server at the same time needs its own name (see
# use_username_as_clientid in mosquitto.conf): make an identity like a device's, and add these two lines for it.
user {SERVER_NAME}
topic readwrite {prefix}/#

# The operator removes what old runs have left, and the announcements of their devices (trainer_server purge). An
# identity of the operator's own leaves the server's connection alone.
user {OPERATOR_NAME}
topic readwrite {prefix}/#
topic readwrite {HOME_ASSISTANT}/device/#
"""


def mosquitto_conf(folder: Path, passwords: bool, port: int = PORTS["mqtts"]) -> str:
    """For a broker that reads its kit from `folder`. Clients have certificates, or user names and `passwords`."""
    password_file = (
        f"""\
# Clients: users of the password file. TLS protects the password.
password_file {folder}/passwords
"""
        if passwords
        else ""
    )
    certificates = (
        ""
        if passwords
        else f"""\
# Clients: owners of a certificate of this CA that is not revoked. Its common name is the user name. After --revoke send
# mosquitto a SIGHUP (systemctl reload): it then refuses new connections. Restart it to end open connections as well.
require_certificate true
use_identity_as_username true
crlfile {folder}/revoked.crl
"""
    )
    return f"""\
# Written by devices.provision for mosquitto 2.0 or newer: mosquitto -c {shlex.quote(f"{folder}/mosquitto.conf")}
# Keys are readable by their owner only. The owner must be the user that mosquitto runs as.

listener {port}
cafile {folder}/ca.crt
certfile {folder}/broker.crt
keyfile {folder}/broker.key
tls_version tlsv1.2
{certificates}# The broker uses the user name as client id. So no client can end another one's connection or use
# its session. It also allows one connection per name only: two processes with one identity end each other's connection.
use_username_as_clientid true

# Where only port 443 is open, mqtts://HOST:443 passes most firewalls: use `listener 443` above. An HTTP proxy needs
# WebSockets, wss://HOST: add a second listener with all the lines above and the next ones. mosquitto 2.0 sends about
# 40 KB/s to a WebSocket, so use it only if nothing else works.
# listener 443
# protocol websockets
# cafile … (all lines as above)

{password_file}allow_anonymous false
acl_file {folder}/acl

# Chunks have 96 KiB and a header (fedfmsl/protocol/chunks.py), announcements of rounds up to 192 KiB. A longer packet
# ends its sender's connection before it is read (message_size_limit would read all of it first, up to 256 MB).
max_packet_size 262144

# Bounds of memory. The broker stores what a client does not read in time: what 1,000 devices with ViT-B/16 send at once
# (13 messages and 1.2 MB each) waits for the server. Beyond these limits it drops messages, and the server asks for the
# missing chunks of updates again. Without upgrade_outgoing_qos there is no limit on messages with QoS 0. Queues need up
# to twice their bytes.
max_queued_messages 20000
max_queued_bytes {QUEUED_BYTES}
upgrade_outgoing_qos true
# The last resort, also for retained messages: the broker ends connections that need more.
memory_limit {MEMORY_BYTES}
# A connection of anybody takes one of them until the broker ends it after 90 s without a login. Each needs a file
# descriptor: limits.conf in this folder raises systemd's limit.
max_connections {CONNECTIONS}
# Unacknowledged messages per client. 20 messages of 96 KiB use a connection with high latency fully.
max_inflight_messages 20

# Sessions and retained messages survive a restart of the broker. Written every minute and at its end (autosave).
persistence true
persistence_location {folder}/
autosave_interval 60
# The broker deletes the session and the queued messages of a device that was offline for two months (2m).
persistent_client_expiration 2m
"""


def systemd_limits() -> str:
    """A drop-in for the service of the mosquitto package."""
    return f"""\
# Written by devices.provision: copy it to /etc/systemd/system/mosquitto.service.d/, then systemctl daemon-reload.
[Service]
LimitNOFILE={2 * CONNECTIONS}
MemoryMax={MEMORY_BYTES * 5 // 4}
Restart=on-failure
RestartSec=5s
"""


def password_line(user: str, password: str) -> str:
    """A line as mosquitto_passwd writes it, with PBKDF2-HMAC-SHA512."""
    salt = secrets.token_bytes(_SALT_BYTES)
    digest = hashlib.pbkdf2_hmac("sha512", password.encode(), salt, _ROUNDS)
    encoded = "$".join(base64.b64encode(part).decode() for part in (salt, digest))
    return f"{user}:$7${_ROUNDS}${encoded}\n"


def new_password() -> str:
    return secrets.token_urlsafe(_PASSWORD_BYTES)
