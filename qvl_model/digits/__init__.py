"""Small models that read scanned digits, one per family: scenes and questions, training, and shipped checkpoints."""

from os import PathLike
from pathlib import Path

__all__ = ["CHECKPOINT", "SAMPLE", "SHIPPED", "checkpoint"]

CHECKPOINT = Path(__file__).parent / "checkpoint"
SAMPLE = Path(__file__).parent / "sample.png"
SHIPPED = {"digits": CHECKPOINT, "qvl-tiny": Path(__file__).parent / "qvl-tiny"}  # a Qwen3-VL and a QVL


def checkpoint(model: str | PathLike | None = None) -> Path:
    """Directory of a model: a directory, or the name of one that ships ("digits", "qvl-tiny"; a directory of that
    name takes precedence).

    Example:
        >>> QVLForConditionalGeneration.from_pretrained(checkpoint("qvl-tiny"))
    """
    path = Path(model if model is not None else "digits")
    return path if (path / "config.json").is_file() else SHIPPED.get(str(path), path)
