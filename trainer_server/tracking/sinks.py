"""The trackers that `--track` names, behind one interface. Each needs its own package, imported when it is opened."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from fedfmsl.errors import ConfigError

LOGIN_SECONDS = 10  # how long W&B may ask for a login before it is an error


@dataclass(frozen=True)
class Origin:
    """What a tracker is told of a run, besides its figures."""

    run: str
    session: str
    facts: Mapping[str, str]

    @property
    def name(self) -> str:
        return f"{self.run}-{self.session[:8]}"


class Sink(Protocol):
    """A tracker. All methods may raise any exception."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """The figures of the closed round number `step`. Steps grow. A step that is there already changes nothing."""

    def close(self) -> None: ...


class TensorBoard:
    """Event files in DIR/RUN-SESSION."""

    def __init__(self, target: str, origin: Origin, after: int) -> None:
        from tensorboardX import SummaryWriter

        # TensorBoard then ignores later steps of an earlier process, of which nobody knows whether all were written
        purge = {"purge_step": after + 1} if after else {}
        # the suffix: files are named by the second, and one replaces another of the same name
        folder = Path(target).expanduser() / origin.name
        self._writer = SummaryWriter(str(folder), filename_suffix=f".{after}", **purge)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class MLflow:
    """One MLflow run per session, in the experiment fedfmsl of a tracking server, a database or a folder."""

    TAG = "fedfmsl.session"
    PROBE = "round/seconds"  # every step has it; it is sent last

    def __init__(self, target: str, origin: Origin, after: int) -> None:
        from mlflow import MlflowClient

        self._client = client = MlflowClient(tracking_uri=target)
        experiment = client.get_experiment_by_name("fedfmsl")
        number = experiment.experiment_id if experiment else client.create_experiment("fedfmsl")
        found = client.search_runs([number], f"tags.`{self.TAG}` = '{origin.session}'")
        if found:
            self._run = found[0].info.run_id
        else:
            self._run = client.create_run(number, run_name=origin.name, tags={self.TAG: origin.session}).info.run_id
            for name, value in origin.facts.items():
                client.log_param(self._run, name, value)
        self._last = max((point.step for point in client.get_metric_history(self._run, self.PROBE)), default=0)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if step <= self._last:
            return
        for name, value in sorted(values.items(), key=lambda item: item[0] == self.PROBE):
            self._client.log_metric(self._run, name, value, step=step)
        self._last = step

    def close(self) -> None:
        self._client.set_terminated(self._run)


class WeightsAndBiases:
    """One W&B run per session. WANDB_MODE=offline writes files, for `wandb sync`."""

    def __init__(self, target: str, origin: Origin, after: int) -> None:
        import wandb

        self._run = wandb.init(
            project=target,
            id=origin.session,
            name=origin.name,
            config=dict(origin.facts),
            resume="allow",
            settings=wandb.Settings(silent=True, login_timeout=LOGIN_SECONDS),
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step, commit=True)

    def close(self) -> None:
        self._run.finish()


Open = Callable[[str, Origin, int], Any]
SINKS: dict[str, tuple[Open, str]] = {  # how to open each, and the package that it needs
    "tensorboard": (TensorBoard, "tensorboardX"),
    "mlflow": (MLflow, "mlflow"),
    "wandb": (WeightsAndBiases, "wandb"),
}


def parse(spec: str) -> tuple[str, str]:
    """Kind and target of a text like tensorboard:DIR. Raises ConfigError for another form."""
    kind, _, target = spec.partition(":")
    if kind not in SINKS or not target:
        raise ConfigError(f"--track {spec!r} is not tensorboard:DIR, mlflow:URI or wandb:PROJECT")
    if kind == "tensorboard":
        folder = Path(target).expanduser()
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not there.is_dir():
            raise ConfigError(f"--track {spec!r}: {there} is a file; give a folder")
    return kind, target


def require_package(spec: str) -> None:
    """Raises ConfigError if the package of this tracker is not installed."""
    kind, _ = parse(spec)
    if find_spec(SINKS[kind][1]) is None:
        raise ConfigError(f"--track {spec} needs the package {SINKS[kind][1]}: pip install 'fedfmsl-edge[{kind}]'")


def open_sink(spec: str, origin: Origin, after: int) -> Sink:
    """Opens a tracker. `after`: the last round that was written. Raises any exception."""
    kind, target = parse(spec)
    sink: Sink = SINKS[kind][0](target, origin, after)
    return sink
