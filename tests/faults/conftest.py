"""Fixtures of fault tests: a bundle without weights, the undisturbed run for comparison, and the fault table."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.brokers import KINDS, RestartableBroker, versions
from support.fault_table import FaultTable, is_whole, write
from support.processes import Processes
from support.run_oracle import Reference, Undisturbed, reference
from support.simulation import Simulation
from support.tools import find_tool, require_tool

from benchmarks.layouts import layout_bundle
from fedfmsl.protocol.bundle import Bundle

RELIABILITY = Path(__file__).parents[2] / "docs" / "reliability.md"
TABLE = pytest.StashKey[FaultTable]()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Writes the table if all fault tests ran in their long form and passed."""
    table = session.config.stash.get(TABLE, None)
    if table and exitstatus == pytest.ExitCode.OK and is_whole(session.config.invocation_params.args):
        write(RELIABILITY, table.markdown(versions()))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    table = config.stash.get(TABLE, None)
    if table and config.getoption("--full"):
        terminalreporter.write_line(table.markdown(versions()))


@pytest.fixture(scope="session")
def table(pytestconfig: pytest.Config) -> FaultTable:
    return pytestconfig.stash.setdefault(TABLE, FaultTable())


@pytest.fixture(scope="session")
def full(pytestconfig: pytest.Config) -> bool:
    return bool(pytestconfig.getoption("--full"))


@pytest.fixture(scope="session")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle whose updates have 0.3 MB, which is four chunks."""
    return layout_bundle(tmp_path_factory.mktemp("bundles") / "layout", 2, hidden=384, blocks=3, classes=200)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Each kind of broker in turn."""
    if request.param == "mosquitto":
        require_tool("mosquitto")
    return str(request.param)


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    with Processes(tmp_path / "logs") as started:
        yield started


@pytest.fixture
def simulation(kind: str, layout: Bundle, processes: Processes, tmp_path: Path) -> Simulation:
    """A run whose broker is started."""
    return Simulation(processes, RestartableBroker(processes, tmp_path, kind), layout, tmp_path)


@pytest.fixture(scope="session")
def undisturbed(layout: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """Runs without a fault, one per number of devices."""
    known: dict[int, Reference] = {}

    def of(devices: int) -> Reference:
        if devices not in known:
            folder = tmp_path_factory.mktemp("undisturbed")
            with Processes(folder / "logs") as processes:
                broker = RestartableBroker(processes, folder, "mosquitto" if find_tool("mosquitto") else "amqtt")
                simulation = Simulation(processes, broker, layout, folder, devices)
                simulation.start_server()
                simulation.start_fleet()
                simulation.finish()
                known[devices] = reference(simulation.out)
                assert len(known[devices].devices) == devices
        return known[devices]

    return of
