"""Qwen3-VL made fast: ``accelerate`` a stock transformers model in place, or import the drop-in class."""

from qvl_model.accelerate import Report, accelerate, is_accelerated, report, restore
from qvl_model.modules.generation import Qwen3VLForConditionalGeneration

__all__ = ["Qwen3VLForConditionalGeneration", "Report", "accelerate", "is_accelerated", "report", "restore"]
