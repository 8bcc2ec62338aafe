"""The public names of ``qvl_model``; importing them registers QVL with transformers' Auto classes."""

from qvl_kernels import __version__ as __version__
from qvl_model import attention, pretrained  # noqa: F401  they register attn_implementation="qvl", and from_pretrained
from qvl_model.accelerate import Report, accelerate, is_accelerated, release, report, restore
from qvl_model.auto import QuantizationConfig, register
from qvl_model.modules.generation import Qwen3VLForConditionalGeneration
from qvl_model.qvl import QVLConfig, QVLForConditionalGeneration, QVLModel

__all__ = [
    "QVLConfig",
    "QVLForConditionalGeneration",
    "QVLModel",
    "QuantizationConfig",
    "Qwen3VLForConditionalGeneration",
    "Report",
    "accelerate",
    "is_accelerated",
    "register",
    "release",
    "report",
    "restore",
]
