"""The processor of a QVL checkpoint: text to tokens, images to pixels of any size, padded to one size per batch.

An image is one token of the text (``image_token``), independent of its size; its pixels are in ``pixel_values``, and
``pixel_attention_mask`` marks the ones that are not padding.
"""

import json
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchEncoding
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from qvl_model.checkpoint_files import load_tokenizer

__all__ = ["QVLImageProcessor", "QVLProcessor"]

FILE = "preprocessor_config.json"


class QVLImageProcessor:
    """Images -> [C, H, W] fp32: scaled into a range of sizes, sides rounded to whole patches, normalised.

    Args:
        patch_size: vision_patch_size of the model.
        min_pixels, max_pixels: smaller and larger images are scaled to these; the aspect ratio is kept.
        image_mean, image_std: of each channel, for values in [0, 1].
    Example:
        >>> QVLImageProcessor(patch_size=16)(image).shape
    """

    def __init__(
        self,
        patch_size: int = 16,
        min_pixels: int = 64 * 64,
        max_pixels: int = 1024 * 1024,
        image_mean: tuple[float, ...] = (0.5, 0.5, 0.5),
        image_std: tuple[float, ...] = (0.5, 0.5, 0.5),
    ) -> None:
        if patch_size < 1 or not 0 < min_pixels <= max_pixels:
            raise ValueError(
                f"QVLImageProcessor: needs patch_size >= 1 and 0 < min_pixels <= max_pixels, got {patch_size}, "
                f"{min_pixels}, {max_pixels}"
            )
        self.patch_size, self.min_pixels, self.max_pixels = patch_size, min_pixels, max_pixels
        self.image_mean, self.image_std = list(image_mean), list(image_std)

    def target_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) that an image is scaled to. Raises: ValueError for an aspect ratio above 200."""
        return smart_resize(height, width, self.patch_size, self.min_pixels, self.max_pixels)

    def __call__(self, image: Image.Image) -> torch.Tensor:
        image = image.convert("RGB")
        height, width = self.target_size(image.height, image.width)
        if (height, width) != (image.height, image.width):
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        pixels = (np.asarray(image, np.float32) / 255 - np.asarray(self.image_mean, np.float32)) / np.asarray(
            self.image_std, np.float32
        )
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))

    @classmethod
    def from_pretrained(cls, path: str | PathLike) -> "QVLImageProcessor":
        """Reads preprocessor_config.json. Raises: OSError without that file; ValueError if it is not one of QVL."""
        try:
            settings = json.loads((Path(path) / FILE).read_text())
            if settings.pop("image_processor_type") != cls.__name__:
                raise ValueError("image_processor_type is another one")
            return cls(**settings)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{Path(path) / FILE} is not of a QVL image processor: {error}") from error

    def save_pretrained(self, path: str | PathLike) -> None:
        Path(path).mkdir(parents=True, exist_ok=True)
        (Path(path) / FILE).write_text(
            json.dumps({"image_processor_type": type(self).__name__, **vars(self)}, indent=2) + "\n"
        )


class QVLProcessor:
    """Tokenizer, image processor and chat template of a QVL checkpoint.

    Example:
        >>> processor = QVLProcessor.from_pretrained(path)
        >>> inputs = processor(images=[image], text=[prompt], return_tensors="pt")
        >>> model.generate(**inputs)
    """

    video_token = None

    def __init__(self, image_processor: QVLImageProcessor, tokenizer: Any, chat_template: str | None = None) -> None:
        self.image_processor, self.tokenizer = image_processor, tokenizer
        self.chat_template = chat_template or tokenizer.chat_template
        self.image_token = getattr(tokenizer, "image_token", None) or "<|image_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)

    @classmethod
    def from_pretrained(cls, path: str | PathLike) -> "QVLProcessor":
        """Reads a checkpoint directory. Raises: OSError for missing files, ValueError for those of another model."""
        return cls(QVLImageProcessor.from_pretrained(path), load_tokenizer(path))

    def save_pretrained(self, path: str | PathLike) -> None:
        self.tokenizer.chat_template = self.chat_template
        self.tokenizer.save_pretrained(path)
        self.image_processor.save_pretrained(path)

    def apply_chat_template(self, conversation: list, **kwargs: Any) -> Any:
        return self.tokenizer.apply_chat_template(conversation, chat_template=self.chat_template, **kwargs)

    def __call__(
        self, images: Any = None, text: str | list[str] | None = None, videos: Any = None, **kwargs: Any
    ) -> BatchEncoding:
        """Model inputs for texts and the images that their image tokens stand for, in order.

        Args:
            images: PIL images; or one list of them per text.
            text: one text or several.
            kwargs: for the tokenizer: padding, padding_side, return_tensors ("pt" with images), add_special_tokens.
        Returns:
            input_ids, attention_mask [B, T]; with images pixel_values [B, C, H, W] and pixel_attention_mask [B, H, W]
            (0 on padding), or [B, images, ...] where a text has several.
        Raises: ValueError for videos, and if image tokens and images differ in number.
        """
        if videos is not None:
            raise ValueError("QVL takes text and images, no videos")
        texts = [text] if isinstance(text, str) else list(text or [])
        encoded = self.tokenizer(texts, **kwargs)
        counts = [item.count(self.image_token) for item in texts]
        flat_images = _flat(images)
        if sum(counts) != len(flat_images):
            raise ValueError(
                f"the texts have {sum(counts)} image tokens ({self.image_token}) for {len(flat_images)} images"
            )
        if flat_images:
            encoded["pixel_values"], encoded["pixel_attention_mask"] = self._pixels(flat_images, counts)
        return encoded

    def _pixels(self, images: list[Image.Image], counts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, images, C, H, W] and [B, images, H, W]; without the dimension of images if no text has more than one."""
        tensors = [self.image_processor(image) for image in images]
        channels, height, width = (max(tensor.shape[i] for tensor in tensors) for i in range(3))
        values = torch.zeros(len(counts), max(counts), channels, height, width)
        mask = torch.zeros(len(counts), max(counts), height, width, dtype=torch.long)
        indices = [(row, i) for row, count in enumerate(counts) for i in range(count)]
        for (row, i), tensor in zip(indices, tensors):
            values[row, i, :, : tensor.shape[1], : tensor.shape[2]] = tensor
            mask[row, i, : tensor.shape[1], : tensor.shape[2]] = 1
        return (values, mask) if max(counts) > 1 else (values[:, 0], mask[:, 0])

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        return self.tokenizer.batch_decode(*args, **kwargs)


def _flat(images: Any) -> list[Image.Image]:
    if images is None:
        return []
    if isinstance(images, Image.Image):
        return [images]
    return [image for item in images for image in _flat(item)]
