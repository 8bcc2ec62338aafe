"""The processor of a checkpoint. For Qwen3-VL it needs no torchvision, unlike transformers' AutoProcessor."""

import json
import os
from pathlib import Path
from typing import Any

from transformers import BatchFeature
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor as StockProcessor

from qvl_model.checkpoint_files import load_tokenizer
from qvl_model.qvl.processing import QVLProcessor

__all__ = ["Qwen3VLProcessor", "load_processor"]


class Qwen3VLProcessor(StockProcessor):
    """The stock processor for text and images; without a video processor, so videos are refused."""

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(image_processor, tokenizer, video_processor=None, chat_template=chat_template)

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> type | None:
        return None if argument is None else super().check_argument_for_proper_class(argument_name, argument)

    def __call__(self, images: Any = None, text: Any = None, videos: Any = None, **kwargs: Any) -> BatchFeature:
        if videos is not None:
            raise ValueError("videos need transformers' own processor and torchvision; this one takes text and images")
        return super().__call__(images=images, text=text, **kwargs)


def load_processor(path: str | os.PathLike) -> Qwen3VLProcessor | QVLProcessor:
    """Tokenizer, image processor (PIL) and chat template of a checkpoint directory of Qwen3-VL or QVL.

    Args:
        path: directory with tokenizer.json, preprocessor_config.json and a chat template (chat_template.jinja, in
            tokenizer_config.json, or in the chat_template.json of older checkpoints).
    Raises: OSError if files are missing; ValueError for files of another model, and if code from the directory would
    have to run.
    Example:
        >>> processor = load_processor(path)
        >>> inputs = processor(images=[image], text=[prompt], return_tensors="pt")
    """
    if _model_type(path) == "qvl":
        return QVLProcessor.from_pretrained(path)
    tokenizer = load_tokenizer(path)
    # By name, since AutoImageProcessor of transformers 5.17 needs torchvision for every backend.
    image_processor = Qwen2VLImageProcessorPil.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    # The processor's template takes precedence, as in transformers; the tokenizer does not read chat_template.json.
    settings, _ = Qwen3VLProcessor.get_processor_dict(path, trust_remote_code=False, local_files_only=True)
    chat_template = settings.get("chat_template") or tokenizer.chat_template
    return Qwen3VLProcessor(image_processor=image_processor, tokenizer=tokenizer, chat_template=chat_template)


def _model_type(path: str | os.PathLike) -> str | None:
    """model_type of config.json, or None without that file; a processor needs no weights beside it."""
    try:
        return json.loads((Path(path) / "config.json").read_text()).get("model_type")
    except (OSError, ValueError, AttributeError):
        return None
