"""Qwen3-VL made fast: ``accelerate`` a stock transformers model in place, or import the drop-in class."""

from qvl_model.accelerate import (
    Qwen3VLForConditionalGeneration,
    Report,
    accelerate,
    is_accelerated,
    report,
    restore,
)

__all__ = ["Qwen3VLForConditionalGeneration", "Report", "accelerate", "is_accelerated", "report", "restore"]
