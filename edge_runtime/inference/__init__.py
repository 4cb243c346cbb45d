"""The use of a trained model: prediction, watched folder, Home Assistant, ONNX export."""
