"""The systemd unit of a device's daemon, as text: its own user, few rights, bounded memory and processors, watched.

Written for systemd 249 (JetPack 6) and newer.
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
_STEPS_SINCE = 254  # systemd's first version with growing pauses between starts


@dataclass(frozen=True)
class Service:
    """What a unit is about: which Python with which settings, what it reads, what it writes beside STATE."""

    python: Path
    config: Path
    reads: Sequence[Path]
    writes: Sequence[Path]
    limits: Limits | None  # of the board, where it is known


def service_unit(service: Service, systemd: int = 0) -> str:
    """For a systemd of that version; of one that is not known only what every one knows."""
    needed = " ".join(_quoted(path) for path in (*service.reads, *service.writes))
    writes = "".join(f"ReadWritePaths={_quoted(path)}\n" for path in service.writes)
    pauses = (
        "RestartSec=10s\nRestartSteps=6\nRestartMaxDelaySec=10min" if systemd >= _STEPS_SINCE else "RestartSec=1min"
    )
    return f"""\
# Written by devices.install, which replaces it; what is to last goes into `systemctl edit {NAME}`.

[Unit]
Description=FedFMSL device: adapts a vision model to the images here, in a federated run
# With a clock that is years behind, as a board's without a battery is, no certificate is valid yet.
After=network-online.target time-sync.target
Wants=network-online.target
RequiresMountsFor={needed}
# However often it fails: it is tried again for months.
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

# A setting that is wrong stays so: that alone is not tried again. A disk, a network or a broker may come back.
Restart=on-failure
{pauses}
RestartPreventExitStatus={WRONG_SETTING}
SuccessExitStatus={TERMINATED}
# It is ready once the broker has let it in; before that a slow board reads a lot of Python off its card.
TimeoutStartSec=5min
# It says that it lives between two pieces of work; the longest, images through the backbone, takes minutes.
WatchdogSec=10min
TimeoutStopSec=2min
LimitCORE=0

# What it may take: of the board's memory and processors, and only what nobody else wants just now.
{_bounds(service.limits)}
CPUWeight=20
IOWeight=20
Nice=10
IOSchedulingClass=idle
TasksMax=256
# Where memory ends the kernel takes this service first; of its processes one may go without the others.
OOMScoreAdjust=500
OOMPolicy=continue

# What it may do: read files, write its own, talk to a network. Images may lie in a home.
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
# ONNX Runtime compiles nothing while it runs, so no memory needs to be writable and executable.
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
    """A path as one word of a unit file, in which % would introduce a specifier."""
    text = str(path).replace("%", "%%")
    if re.fullmatch(r"[\w/.:@%+=,~-]+", text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
