"""Sends the figures of closed rounds to experiment trackers: TensorBoard, MLflow, Weights & Biases."""
