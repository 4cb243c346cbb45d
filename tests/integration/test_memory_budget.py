"""A device with a memory budget, in a process whose memory the kernel limits."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from support.bundles import build
from support.processes import Broker, Federation, Observer, Processes
from support.samples import CLASSES, write_device_photos
from support.tiny_models import write_vit

from edge_runtime.engines.base import MemoryPlan
from edge_runtime.engines.step_graph import default_micro_batch
from edge_runtime.resources.plan import Plan
from edge_runtime.resources.probe import BATCH
from fedfmsl.protocol.messages import Round, Stage
from fedfmsl.protocol.task_bundle import TaskBundle

LEVELS = 6
SHAPE = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768, "patch_size": 2}
MB = 10**6
BUDGET = 180 * MB
UNTOUCHED = 64 * MB  # reserved by allocators and never used; how much depends on the processor


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> TaskBundle:
    """257 tokens of 192 values: the memory of a training step depends on the micro-batch."""
    weights = write_vit(tmp_path_factory.mktemp("weights"), num_hidden_layers=LEVELS, **SHAPE)
    return build(weights, tmp_path_factory.mktemp("bundles") / "wide").bundle


def test_a_run_stays_within_its_budget(wide: TaskBundle, broker: Broker, tmp_path: Path) -> None:
    """The kernel limits the data of a process, which is everything but mapped files. Unlike the budget, it counts
    memory that is allocated and never used, and does not count the code of libraries (some 45 MB). The device reports
    its peak memory, which the test compares with the budget."""
    photos = tmp_path / "photos"
    write_device_photos(photos, dict.fromkeys(CLASSES, 8), seed=0)
    with Processes(tmp_path / "logs") as processes:
        federation = Federation("bounded", broker, wide.root, {"device-0": photos}, tmp_path, processes)
        with Observer(broker, "bounded") as observer:
            server = federation.start_server(
                "--stage1-rounds", "1", "--stage2-rounds", "1", "--sal", "all-at-once", "--epochs", "1"
            )
            device = processes.start(
                "device",
                *("sh", "-c", f'ulimit -d {(BUDGET + UNTOUCHED) // 1024} && exec "$@"', "sh"),
                *(sys.executable, "-m", "edge_runtime", "run", "--run", "bounded", "--device", "device-0"),
                *("--images", str(photos), "--bundle", str(wide.root), "--broker", broker.url),
                *("--state", str(federation.state("device-0")), "--threads", "1", "--memory", f"{BUDGET // MB}MB"),
                environment={"OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},  # reserves less
            )
            observer.wait(Round, lambda r: r.stage is Stage.FINISHED, "the end of the run")
            assert device.wait().code == server.wait().code == 0
    plan = Plan(**json.loads((federation.state("device-0") / "plan.json").read_text())["plan"])
    assert plan.level_cap == LEVELS
    usual = min(BATCH, default_micro_batch(wide.manifest.dims, LEVELS))
    assert plan.memory_plans[LEVELS] in [MemoryPlan(size) for size in range(1, usual)] + [MemoryPlan(1, lean=True)]
    updates = [closed["updates"]["device-0"] for closed in federation.rounds()]
    assert max(update["level"] for update in updates) == LEVELS
    assert max(update["peak_rss_mb"] for update in updates) * 2**20 <= BUDGET
    assert (federation.state("device-0") / "personalized.onnx").is_file()
