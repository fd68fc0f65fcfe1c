"""DEVICE HALF: measures bundles; never torch, transformers, optimum or onnx."""
