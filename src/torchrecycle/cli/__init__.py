"""The command ``torchrecycle``: argument parsing and printing only."""

from torchrecycle.cli.main import app

__all__ = ["app"]
