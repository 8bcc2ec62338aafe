"""The ``qvl`` command: one file per subcommand, none of which imports PyTorch before it runs."""

from qvl_model.cli.main import main

__all__ = ["main"]
