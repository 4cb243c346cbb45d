"""fedfmsl, or python -m fedfmsl: one command for all parts."""

from __future__ import annotations

import typer

import fedfmsl
from fedfmsl.common.lazy_group import LazyCommand, lazy_group

PARTS = {
    "export": LazyCommand(
        "export.__main__",
        "export",
        "Export a frozen backbone as a bundle for edge devices; move a global expert to and from the Hugging Face hub.",
    ),
    "server": LazyCommand(
        "trainer_server.__main__", "server", "Coordinate a federated run: both stages of FedFMSL, over MQTT."
    ),
    "edge": LazyCommand(
        "edge_runtime.__main__",
        "edge",
        "Adapt a foundation model to the images or texts of this device, in a federated run.",
    ),
    "predict": LazyCommand(
        "edge_runtime.__main__", "edge", "Classify images or texts with a personalized model.", command="predict"
    ),
    "provision": LazyCommand(
        "devices.provision", "server", "Make a fleet's CA, broker kit and identities; renew and revoke them."
    ),
    "install": LazyCommand(
        "devices.install",
        "edge",
        "Install the daemon on this machine as a service. A repeated installation replaces the settings, not the "
        "state.",
    ),
    "simulate": LazyCommand(
        "simulation.__main__",
        "simulation",
        "Simulate a federation of virtual devices on this machine, and compare methods: real training, no network.",
    ),
    "trial": LazyCommand(
        "devices.trial.__main__",
        "trial",
        "Run a whole federated trial on this machine: real photos, a real backbone, a broker, N devices.",
    ),
}


def _print_version(wanted: bool) -> None:
    if wanted:
        print(fedfmsl.__version__)
        raise typer.Exit


def _main(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
    ),
) -> None: ...


app = lazy_group(
    "Federated LoRA adaptation of foundation models on edge devices.",
    PARTS,
    callback=_main,
    add_completion=True,
    no_args_is_help=True,
)

if __name__ == "__main__":
    app(prog_name="fedfmsl")
