"""``python -m torchrecycle.cli``."""

from torchrecycle.cli.main import app

app(prog_name="torchrecycle")
