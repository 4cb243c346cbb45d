"""python -m devices.trial: the command of the trial. `devices.trial.run` runs it."""

from __future__ import annotations

from devices.trial.settings import TrialSettings
from fedfmsl.common.cli import application
from fedfmsl.common.options import with_settings

app = application()


@app.command()
@with_settings(TrialSettings)
def trial(settings: TrialSettings) -> None:
    """Run a whole federated trial on this machine: real photos, a real backbone, a broker, N devices."""
    from devices.trial.run import run_trial  # with all that a trial needs, matplotlib too

    run_trial(settings)


if __name__ == "__main__":
    app()
