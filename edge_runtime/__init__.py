"""The device: samples, features, engines, training of experts and gate, and the daemon. Does not need torch."""

import os

# Read when ONNX Runtime is loaded. By default ONNX Runtime 1.32 stores a device ID and reports every session.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
