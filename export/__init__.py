"""Once per model, on the server: Hugging Face weights → bundle."""

import os

# before it is loaded: ONNX Runtime 1.32 keeps a device's id and tells its maker of every session, unless told not to
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
