"""What a run and its present session were started with, as the server stores it."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel

from trainer_server.config import RunConfig
from trainer_server.storage.start_record import StartOrigin


class First(BaseModel):
    """What the first session of a run was started with. `source`: the folder of --from."""

    session: str
    task: str
    source: str | None


class Origin(BaseModel):
    """What the present session of a run was started with. `config`: of the whole run. `bundle`: the bundle's folder.
    `sha256`: the bundle's hash. `task`: the task's. `start`: what it goes on from; None if it starts afresh.
    `stage1_rounds`: of this session, if there is a choice. `before`: of the first session, if it is another one."""

    config: RunConfig
    session: str
    bundle: Path
    sha256: str
    task: str
    start: StartOrigin | None = None
    stage1_rounds: int | None = None
    before: First | None = None

    @property
    def first(self) -> First:
        source = self.start.source if self.start else None
        return self.before or First(session=self.session, task=self.task, source=source)

    @property
    def session_config(self) -> RunConfig:
        """What the coordinator follows in this session."""
        rounds = self.stage1_rounds
        return self.config if rounds is None else self.config.model_copy(update={"stage1_rounds": rounds})

    @property
    def spent_before(self) -> dict[str, float]:
        """The sums of μ² of earlier runs, by observer."""
        return dict(self.start.mu_squared or {}) if self.start else {}

    @property
    def uncounted(self) -> str:
        """What the privacy budget does not count of earlier runs; "" if it counts all."""
        if self.start is None or self.config.privacy is None or self.start.mu_squared is not None:
            return ""
        return f"ε counts this run only: what was sent for {self.first.source} had no noise, or is unknown"
