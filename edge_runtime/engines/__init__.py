"""Engines: they train and evaluate experts on ONNX Runtime."""
