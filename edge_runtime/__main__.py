"""python -m edge_runtime: the daemon and its commands, which are in `edge_runtime.commands`."""

from __future__ import annotations

from fedfmsl.common.lazy_group import commands_in, lazy_group

COMMANDS = {
    "run": "Take part in a run until it is finished. With --watch, also classify new files, and continue after the "
    "run.",
    "check": "Check what a run needs: clock, disk, broker, certificate, bundle, samples, memory. Writes nothing.",
    "enroll": "Make this device's key, and get its certificate. The key stays on this device.",
    "status": "Show the state of this device. Fails if its daemon does not run.",
    "predict": "Classify images or texts with a personalized model.",
    "page": 'Serve the device\'s page: what it is doing, and "What is this?". The daemon starts it with --page.',
    "personalize": "Write the personalized model of the last round as one self-contained ONNX file, or as a folder.",
    "rollback": "Use the personalized model from before the present one for predictions, at once and without the "
    "server.",
    "probe": "Measure a round of each level from the first; print one JSON object per level.",
    "try-provider": "Compute with one execution provider; write outputs and seconds.",
}
app = lazy_group(
    "Adapt a foundation model to the images or texts of this device, in a federated run.",
    commands_in("edge_runtime.commands", "edge", COMMANDS, hidden=("probe", "try-provider")),
)

if __name__ == "__main__":
    app()
