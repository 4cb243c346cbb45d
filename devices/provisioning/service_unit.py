"""Text of the daemon's systemd unit: own user, few privileges, limits on memory and processors, watchdog.

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
WRONG_SETTING = 2  # ConfigError's exit code
TERMINATED = 128 + 15
_STEPS_SINCE = 254  # systemd's first version with growing delays between restarts


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
NoNewPrivileges=yes
CapabilityBoundingSet=
ProtectSystem=strict
{writes}ProtectHome=read-only
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
# ONNX Runtime does not compile at run time, so no memory needs to be writable and executable.
MemoryDenyWriteExecute=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallFilter=~@privileged
SystemCallErrorNumber=EPERM

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
