"""python -m simulation: the command of the simulator. `simulation.run` runs it."""

from __future__ import annotations

from fedfmsl.common.cli import application
from fedfmsl.common.options import with_settings
from simulation.settings import SimulationSettings

app = application()


@app.command()
@with_settings(SimulationSettings)
def simulation(settings: SimulationSettings) -> None:
    """Simulate a federation of virtual devices on this machine, and compare methods: real training, no network."""
    from simulation.run import simulate

    simulate(settings)


if __name__ == "__main__":
    app()
