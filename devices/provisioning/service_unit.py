"""Texts of the systemd units of daemon and server: own user, few privileges, limits on memory and processors.

For systemd 249 (JetPack 6) and newer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from devices.provisioning.boards import MEMORY_HIGH, MEMORY_MAX, Limits

NAME, USER = "fedfmsl", "fedfmsl"
STATE = Path("/var/lib") / NAME
SERVER, SERVER_CONFIG = "fedfmsl-server", Path("/etc/fedfmsl/server.toml")  # the run's server
WRONG_SETTING = 2  # ConfigError's exit code
TERMINATED = 128 + 15
_STEPS_SINCE = 254  # systemd's first version with growing delays between restarts

_HARDENING = """\
NoNewPrivileges=yes
CapabilityBoundingSet=
ProtectSystem=strict
ProtectHome=read-only
PrivateTmp=yes
PrivateDevices=yes
PrivateUsers=yes
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectProc=invisible
RemoveIPC=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallFilter=~@privileged
SystemCallErrorNumber=EPERM"""


@dataclass(frozen=True)
class Service:
    """Python and settings file of the daemon, the paths that it reads, and those that it writes beside STATE."""

    python: Path
    config: Path
    reads: Sequence[Path]
    writes: Sequence[Path]
    limits: Limits | None  # None if the board is unknown


def service_unit(service: Service, systemd: int = 0) -> str:
    """For that version of systemd. 0 is an unknown version: only directives that all versions know."""
    needed = " ".join(_quoted(path) for path in (*service.reads, *service.writes))
    writes = "".join(f"ReadWritePaths={_quoted(path)}\n" for path in service.writes)
    delays = (
        "RestartSec=10s\nRestartSteps=6\nRestartMaxDelaySec=10min" if systemd >= _STEPS_SINCE else "RestartSec=1min"
    )
    return f"""\
# Written by devices.install, which overwrites it. Make changes with `systemctl edit {NAME}`.

[Unit]
Description=FedFMSL device: federated adaptation of a foundation model to local data
# Without a battery a board's clock is years behind after boot, and no certificate is valid before it is set.
After=network-online.target time-sync.target
Wants=network-online.target
RequiresMountsFor={needed}
# No limit on the number of restarts.
StartLimitIntervalSec=0

[Service]
Type=notify
NotifyAccess=main
ExecStart={_quoted(service.python)} -m edge_runtime run --config {_quoted(service.config)}
User={USER}
Group={USER}
StateDirectory={NAME}
StateDirectoryMode=0700
UMask=0077

# Disk, network and broker may recover, so every failure leads to a restart, except a wrong setting.
Restart=on-failure
{delays}
RestartPreventExitStatus={WRONG_SETTING}
SuccessExitStatus={TERMINATED}
# The daemon is ready once it is connected to the broker. A slow board needs minutes to load Python from its card.
TimeoutStartSec=5min
# The daemon notifies the watchdog between two steps; the longest, images through the backbone, takes minutes.
WatchdogSec=10min
TimeoutStopSec=2min
LimitCORE=0

# Limits of memory and processors, and a low priority, so that other processes come first.
{_bounds(service.limits)}
CPUWeight=20
IOWeight=20
Nice=10
IOSchedulingClass=idle
TasksMax=256
# If memory runs out, the kernel kills a process of this service first. The other ones continue.
OOMScoreAdjust=500
OOMPolicy=continue

# Privileges: read files, write its own files, use the network. Images may be in a home directory.
{writes}{_HARDENING}
# ONNX Runtime does not compile at run time, so no memory needs to be writable and executable.
MemoryDenyWriteExecute=yes

[Install]
WantedBy=multi-user.target
"""


def server_unit(python: Path) -> str:
    """The unit of the run's server, with the same restrictions. Its settings and identity are in one folder."""
    folder = SERVER_CONFIG.parent
    return f"""\
# Written by devices.provision for the server's machine. Settings are in {SERVER_CONFIG}, for example:
#   run = "orchard"
#   devices = 2
#   bundle = "/var/lib/{SERVER}/bundle"
#   out = "/var/lib/{SERVER}/orchard"
#   broker = "mqtts://fleet.example"
#   identity = "server.pem"
#   serve = "fleet.example:8443"
# To install it, as root:
#   useradd --system --user-group --no-create-home --home-dir /var/lib/{SERVER} -s /usr/sbin/nologin {SERVER}
#   install -o {SERVER} -m 600 -t {folder} server.pem server.toml
#   cp broker/revoked.crl {folder}/ && cp {SERVER}.service /etc/systemd/system/
#   systemctl daemon-reload && systemctl enable --now {SERVER}

[Unit]
Description=FedFMSL server: coordinates a federated run
After=network-online.target time-sync.target
Wants=network-online.target
# No limit on the number of restarts.
StartLimitIntervalSec=0

[Service]
ExecStart={_quoted(python)} -m trainer_server start --config {SERVER_CONFIG}
User={SERVER}
Group={SERVER}
StateDirectory={SERVER}
StateDirectoryMode=0700
WorkingDirectory=/var/lib/{SERVER}
UMask=0077

# It resumes its run after a failure. It ends when the run is finished, and a wrong setting is no reason to try again.
Restart=on-failure
RestartSec=10s
RestartPreventExitStatus={WRONG_SETTING}
SuccessExitStatus={TERMINATED}
TimeoutStopSec=2min
LimitCORE=0
LimitNOFILE=4096
MemoryHigh={MEMORY_HIGH:.0%}
MemoryMax={MEMORY_MAX:.0%}
TasksMax=1024

# Privileges: read files, write its own files, use the network.
{_HARDENING}
MemoryDenyWriteExecute=yes

[Install]
WantedBy=multi-user.target
"""


def _bounds(limits: Limits | None) -> str:
    if limits is None:
        return f"MemoryHigh={MEMORY_HIGH:.0%}\nMemoryMax={MEMORY_MAX:.0%}"
    return f"MemoryHigh={limits.memory_high}\nMemoryMax={limits.memory_max}\nCPUQuota={limits.cpu_quota}%"


def _quoted(path: Path) -> str:
    """A path as one word of a unit file. % is escaped, because it starts a specifier."""
    text = str(path).replace("%", "%%")
    if re.fullmatch(r"[\w/.:@%+=,~-]+", text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
