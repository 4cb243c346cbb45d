"""python -m devices.boards: shows the detected board and the daemon's limits on it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import typer

from devices.provisioning.boards import Board, detect_board
from fedfmsl.common.cli import application, console, print_json

_MB = 1_000_000

app = application()


@app.command()
def boards(
    root: Path = typer.Option(Path("/"), help="Root folder of the system, for example of a mounted SD card."),
    as_json: bool = typer.Option(False, "--json", help="One JSON object."),
) -> None:
    """Show the detected board and the daemon's limits on it."""
    board = detect_board(root)
    if as_json:
        print_json({**asdict(board), "limits": asdict(board.limits)})
        return
    for name, value in _facts(board).items():
        console.print(f"{name:<12} {value}", highlight=False)


def _facts(board: Board) -> dict[str, str]:
    limits = board.limits
    zones = ", ".join(f"{zone.name} {zone.celsius:.0f} °C" for zone in board.zones)
    memory = f"{board.memory // _MB} MB; the daemon plans with {limits.memory // _MB} MB, its processes get at most "
    memory += f"{limits.memory_max // _MB} MB" + ("" if board.bounds_memory else " (this kernel does not enforce it)")
    return {
        "board": f"{board.model} ({board.kind})",
        "processors": f"{board.cores} cores; the daemon uses {limits.threads}",
        "memory": memory,
        "temperature": f"{zones or 'no sensor'}; the daemon trains up to {limits.max_temperature:.0f} °C",
        "power": ", ".join(board.power) or "no problems reported",
    }


if __name__ == "__main__":
    app()
