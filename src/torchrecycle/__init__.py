"""torchrecycle: layer recycling for PyTorch."""
