"""DEVICE HALF: runs bundles; never torch, transformers, optimum or onnx."""
