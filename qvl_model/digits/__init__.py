"""A small Qwen3-VL that reads scanned digits: scenes and questions, training, and the checkpoint that ships."""

from pathlib import Path

__all__ = ["CHECKPOINT", "SAMPLE"]

CHECKPOINT = Path(__file__).parent / "checkpoint"
SAMPLE = Path(__file__).parent / "sample.png"
