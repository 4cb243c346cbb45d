"""Fixtures of fault tests: a bundle without weights, the undisturbed run for comparison, and the fault table."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import fault_table
from support.brokers import KINDS, RestartableBroker, versions
from support.bundles import build
from support.fault_records import Records, Row, product_commit
from support.processes import Federation, Observer, Processes
from support.real_run import OTHERS, RUN, VICTIM, RealRun, Shape, undisturbed_run
from support.run_oracle import Reference, Undisturbed, reference
from support.samples import CLASSES, write_device_photos
from support.simulation import Simulation
from support.tools import find_tool, require_tool

from benchmarks.layouts import layout_bundle
from fedfmsl.protocol.task_bundle import TaskBundle

RELIABILITY = Path(__file__).parents[2] / "docs" / "reliability.md"
TIMES = 10  # of each fault in the long form
ROW = pytest.StashKey[Row]()
RECORDS = pytest.StashKey[Records]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RECORDS] = Records(product_commit() if config.getoption("--full") else "")
    if config.getoption("--full") and not hasattr(config, "workerinput"):
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops as Ctrl-C does, also in the background


@pytest.hookimpl(trylast=True)  # after tests/conftest.py has sorted
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The long form goes on after the last test that it has finished for this commit. Tests with a row come first."""
    if config.getoption("--full"):
        done = {record.test for record in config.stash[RECORDS]}
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
        items[:] = [item for item in items if item.nodeid not in done]
        items.sort(key=lambda item: "row" not in getattr(item, "fixturenames", ()))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = (yield).get_result()  # type: ignore[attr-defined]
    finished = report.failed if report.when != "call" else not report.skipped
    if finished and item.config.getoption("--full"):
        failure = " ".join(call.excinfo.exconly().split())[:300] if call.excinfo else ""
        folder = getattr(item, "funcargs", {}).get("tmp_path")
        row = item.stash.get(ROW, Row())
        item.config.stash[RECORDS].append(item.nodeid, row, failure, folder and folder / "logs")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """`make faults` writes the table, also when it is interrupted."""
    config = session.config
    whole = config.args == fault_table.PATHS and not config.getoption("keyword")
    if config.getoption("--full") and whole and not hasattr(config, "workerinput"):
        fault_table.write(RELIABILITY, fault_table.markdown(config.stash[RECORDS], versions()))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.getoption("--full"):
        terminalreporter.write_line(fault_table.markdown(config.stash[RECORDS], versions()))


@pytest.fixture
def row(request: pytest.FixtureRequest) -> Row:
    return request.node.stash.setdefault(ROW, Row())  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def full(pytestconfig: pytest.Config) -> bool:
    return bool(pytestconfig.getoption("--full"))


@pytest.fixture(scope="session")
def times(full: bool) -> int:
    """How often a fault strikes in a run."""
    return TIMES if full else 1


@pytest.fixture(scope="session")
def layout(tmp_path_factory: pytest.TempPathFactory) -> TaskBundle:
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
def simulation(kind: str, layout: TaskBundle, processes: Processes, tmp_path: Path, times: int) -> Simulation:
    """A run whose broker is started, long enough for `times` faults."""
    return Simulation.for_faults(times, processes, RestartableBroker(processes, tmp_path, kind), layout, tmp_path)


@pytest.fixture(scope="session")
def undisturbed(layout: TaskBundle, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """Runs without a fault, one for each number of devices and of rounds of stage 1."""
    known: dict[tuple[int, int], Reference] = {}

    def of(devices: int, rounds: int) -> Reference:
        if (devices, rounds) not in known:
            folder = tmp_path_factory.mktemp("undisturbed")
            with Processes(folder / "logs") as processes:
                broker = RestartableBroker(processes, folder, "mosquitto" if find_tool("mosquitto") else "amqtt")
                simulation = Simulation(processes, broker, layout, folder, devices, rounds)
                simulation.start_server()
                simulation.start_fleet()
                simulation.finish()
                known[devices, rounds] = reference(simulation.out)
                assert len(known[devices, rounds].devices) == devices
        return known[devices, rounds]

    return of


@pytest.fixture(scope="session")
def device_photos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("devices")
    counts = [{"apple": 10, "kiwi": 10}, {"kiwi": 10, "lemon": 8}, dict.fromkeys(CLASSES, 6)]
    given = enumerate(zip((VICTIM, *OTHERS), counts, strict=True))
    return {name: write_device_photos(folder / name, each, seed) for seed, (name, each) in given}


@pytest.fixture(scope="session")
def wide(vit_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with so many classes that an update of class sums is several chunks."""
    classes = (*CLASSES, *(f"class-{index}" for index in range(2000)))
    return build(vit_folder, tmp_path_factory.mktemp("bundles") / "wide", levels=1, classes=classes).bundle.root


@pytest.fixture(scope="session")
def undisturbed_real(
    wide: Path, device_photos: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[RealRun], Reference]:
    """The run of the same shape without a fault."""
    known: dict[Shape, Reference] = {}

    def of(run: RealRun) -> Reference:
        if run.shape not in known:
            folder, kind = tmp_path_factory.mktemp("undisturbed"), "mosquitto" if find_tool("mosquitto") else "amqtt"
            known[run.shape] = undisturbed_run(run.shape, run.federation.bundle, device_photos, folder, kind)
        return known[run.shape]

    return of


@pytest.fixture
def real_run(
    kind: str, wide: Path, device_photos: dict[str, Path], processes: Processes, tmp_path: Path, full: bool
) -> Iterator[RealRun]:
    """A run whose broker is started."""
    broker = RestartableBroker(processes, tmp_path, kind)
    federation = Federation(RUN, broker, wide, device_photos, tmp_path, processes)
    with Observer(broker, RUN) as observer:
        yield RealRun(federation, observer, Shape(44, 12) if full else Shape(8, 8))
