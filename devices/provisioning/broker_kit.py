"""The files of a mosquitto (2.0 or newer) that lets a fleet in and nobody else, as texts."""

from __future__ import annotations

import base64
import hashlib
import secrets
import shlex
from pathlib import Path

from fedfmsl.protocol.topics import ROOT

SERVER = "server"  # the run's server: its identity's common name, or its user
HOME_ASSISTANT = "homeassistant"  # likewise; also the prefix that it and the devices speak below

# Of PBKDF2, mosquitto's own default. Our passwords are random and long, so more rounds would only make the broker,
# which counts them in its one thread, slow when a fleet comes back.
_ROUNDS = 101
_SALT_BYTES = 12
_PASSWORD_BYTES = 24


def acl() -> str:
    """Who may read and write what; everything that is not named here is forbidden.

    mosquitto grants every subscription, also to a wildcard, and asks this file at each message that it would deliver.
    """
    return f"""\
# Written by devices.provision. What is not named here is forbidden, to everybody.
# %u is the name in the client's certificate, or its user.

# A device writes what it says of itself, and nothing else;
pattern write {ROOT}/+/devices/%u/status
pattern write {ROOT}/+/devices/%u/progress
pattern write {ROOT}/+/devices/%u/update/#
pattern write {ROOT}/+/devices/%u/health
pattern write {ROOT}/+/devices/%u/prediction
# it reads what the server tells everybody, and what it tells this device.
pattern read {ROOT}/+/devices/%u/status
pattern read {ROOT}/+/devices/%u/ack
pattern read {ROOT}/+/server/status
pattern read {ROOT}/+/round
pattern read {ROOT}/+/globals/#
# It introduces itself to Home Assistant, under its own name (its setting home_assistant is the first part here).
pattern write {HOME_ASSISTANT}/device/+/%u/config

# Home Assistant hears who introduces itself, how it is and what it sees; it tells when it has been started.
user {HOME_ASSISTANT}
topic read {HOME_ASSISTANT}/#
topic write {HOME_ASSISTANT}/status
topic read {ROOT}/+/devices/+/status
topic read {ROOT}/+/devices/+/health
topic read {ROOT}/+/devices/+/prediction

# The server reads and writes everything of a run. A second server at the same time needs a name of its own (see
# use_username_as_clientid in mosquitto.conf): make an identity like a device's, and add its two lines here.
user {SERVER}
topic readwrite {ROOT}/#
"""


def mosquitto_conf(folder: Path, passwords: bool) -> str:
    """For a broker whose kit lies in `folder`: devices show certificates, or names and `passwords`."""
    who = (
        f"""\
# Who: a user of the password file; over TLS, so that nobody reads the password on the way.
password_file {folder}/passwords
"""
        if passwords
        else ""
    )
    certificates = (
        ""
        if passwords
        else f"""\
# Who: the common name of a certificate of our CA that is not revoked. After --revoke send mosquitto a SIGHUP (systemctl
# reload), and nobody comes in with it any more; who is in stays until its connection ends: restart it to be sure.
require_certificate true
use_identity_as_username true
crlfile {folder}/revoked.crl
"""
    )
    return f"""\
# Written by devices.provision for mosquitto 2.0 or newer: mosquitto -c {shlex.quote(f"{folder}/mosquitto.conf")}
# Keys are readable by their owner only: let the files belong to the user that mosquitto runs as.

listener 8883
cafile {folder}/ca.crt
certfile {folder}/broker.crt
keyfile {folder}/broker.key
tls_version tlsv1.2
{certificates}# A client's id is its name, whatever id it gives: nobody ends another's connection, or takes its session,
# by connecting with its id. It also means one connection per name: two processes with one identity end each other's.
use_username_as_clientid true

# Where only 443 leads out, mqtts://HOST:443 passes most firewalls: take `listener 443` above. A proxy that wants HTTP
# needs WebSockets, wss://HOST: a second listener with all the lines above and one more. mosquitto 2.0 sends about
# 40 KB/s to a WebSocket, so take it only where nothing else passes.
# listener 443
# protocol websockets
# cafile … (and so on, as above)

{who}allow_anonymous false
acl_file {folder}/acl

# Chunks are 96 KiB and their head (protocol/tensors.py), announcements of rounds up to 128 KiB; what is longer is not
# ours. Its sender is cut off before it is read (message_size_limit would read all of it first, up to 256 MB).
max_packet_size 262144

# A queued message that is dropped is waited for in vain: no limit to their number (the server publishes the 700 chunks
# of the largest expert at once). The limit to their bytes is what the server may still have to read, 1,000 devices'
# updates of ViT-B/16 (1.2 MB) at once, and what a hostile device can make the broker keep.
max_queued_messages 0
max_queued_bytes 2000000000
# Sent at once and not yet acknowledged: enough to fill a line with latency, 20 · 96 KiB in the broker's memory.
max_inflight_messages 20

# Sessions and retained messages survive the broker's restart; written every minute, and at its end.
persistence true
persistence_location {folder}/
autosave_interval 60
# A device that has not come back for so long is forgotten, with what is queued for it.
persistent_client_expiration 2m
"""


def password_line(user: str, password: str) -> str:
    """As mosquitto_passwd writes it: PBKDF2-HMAC-SHA512."""
    salt = secrets.token_bytes(_SALT_BYTES)
    digest = hashlib.pbkdf2_hmac("sha512", password.encode(), salt, _ROUNDS)
    encoded = "$".join(base64.b64encode(part).decode() for part in (salt, digest))
    return f"{user}:$7${_ROUNDS}${encoded}\n"


def new_password() -> str:
    return secrets.token_urlsafe(_PASSWORD_BYTES)
