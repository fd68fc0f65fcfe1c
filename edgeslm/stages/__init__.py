"""WORKSTATION HALF: makes bundles; may import torch."""
