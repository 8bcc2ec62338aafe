"""Qwen3-VL and QVL made fast: ``accelerate`` a model in place, or import the drop-in class of Qwen3-VL."""

import os
import sys


def _is_command() -> bool:
    """Whether this process is the ``qvl`` command. It prints help before PyTorch could be imported, and imports
    ``qvl_model.api`` where it needs it.
    """
    if sys.argv[0] == "-m":  # while Python looks for the module
        return ["-m", "qvl_model.cli"] in ([*pair] for pair in zip(sys.orig_argv, sys.orig_argv[1:]))
    return os.path.basename(sys.argv[0]) == "qvl"


if not _is_command():
    from qvl_model.api import (
        QuantizationConfig,
        QVLConfig,
        QVLForConditionalGeneration,
        QVLModel,
        Qwen3VLForConditionalGeneration,
        Report,
        __version__,  # noqa: F401
        accelerate,
        is_accelerated,
        register,
        release,
        report,
        restore,
    )

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
