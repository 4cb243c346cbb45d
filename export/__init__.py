"""Exports Hugging Face weights as a bundle, once per model, on the server."""

import os

# Must be set before ONNX Runtime is imported. Otherwise version 1.32 stores a device ID and reports every session.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
