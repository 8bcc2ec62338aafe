"""An OpenAI-compatible endpoint over an accelerated model: ``qvl serve``."""

from qvl_model.serving.app import Limits, build_app
from qvl_model.serving.engine import Engine

__all__ = ["Engine", "Limits", "build_app"]
