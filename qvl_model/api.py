"""The public names of ``qvl_model``; importing them registers QVL with transformers' Auto classes."""

from qvl_kernels import __version__ as __version__
from qvl_model import pretrained  # noqa: F401  provides from_pretrained of the classes
from qvl_model.accelerate import Report, accelerate, is_accelerated, release, report, restore
from qvl_model.modules.generation import Qwen3VLForConditionalGeneration
from qvl_model.qvl import QVLConfig, QVLForConditionalGeneration, QVLModel

__all__ = [
    "QVLConfig",
    "QVLForConditionalGeneration",
    "QVLModel",
    "Qwen3VLForConditionalGeneration",
    "Report",
    "accelerate",
    "is_accelerated",
    "release",
    "report",
    "restore",
]
