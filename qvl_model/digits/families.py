"""Differences between the digits models of the two families: class, config, image processor, pixels, image tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from qvl_model.digits import scenes
from qvl_model.qvl import QVLConfig, QVLForConditionalGeneration
from qvl_model.qvl.processing import QVLImageProcessor

__all__ = ["FAMILIES", "Family"]

PATCH, MERGE, TEMPORAL = 16, 2, 2  # of Qwen3-VL
MIN_PIXELS = 32 * 32


@dataclass(frozen=True)
class Family:
    """A family at small width.

    Attributes:
        model: its class for generation.
        config: from the id of each special token.
        image_processor: as it is saved beside the model.
        image: (image uint8 [32, 96, 3], image tokens bool [T]) -> the model's inputs for the image, as from the
            processor.
        places: image tokens in the text.
    """

    model: type[PreTrainedModel]
    config: Callable[[dict[str, int]], Any]
    image_processor: Callable[[], Any]
    image: Callable[[np.ndarray, Tensor], dict[str, Tensor]]
    places: int


def _qwen3_vl_config(ids: dict[str, int]) -> Qwen3VLConfig:
    return Qwen3VLConfig(
        text_config={
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "head_dim": 32,
            "vocab_size": 384,
            "max_position_embeddings": 2048,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
            "tie_word_embeddings": True,
            "pad_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
        },
        vision_config={
            "depth": 4,
            "hidden_size": 128,
            "num_heads": 4,
            "intermediate_size": 512,
            "patch_size": PATCH,
            "temporal_patch_size": TEMPORAL,
            "spatial_merge_size": MERGE,
            "out_hidden_size": 192,
            "deepstack_visual_indexes": [1],
            "num_position_embeddings": 64,
        },
        tie_word_embeddings=True,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )


def _qwen3_vl_image_processor() -> Qwen2VLImageProcessorPil:
    return Qwen2VLImageProcessorPil(
        size={"shortest_edge": MIN_PIXELS, "longest_edge": 512 * 512},
        patch_size=PATCH,
        merge_size=MERGE,
        temporal_patch_size=TEMPORAL,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )


def _qwen3_vl_image(image: np.ndarray, places: Tensor) -> dict[str, Tensor]:
    """Patches, those that are merged next to each other, each frame twice."""
    x = image.astype(np.float32).transpose(2, 0, 1) / 127.5 - 1.0
    rows, columns = scenes.HEIGHT // PATCH, scenes.WIDTH // PATCH
    x = x.reshape(3, rows // MERGE, MERGE, PATCH, columns // MERGE, MERGE, PATCH)
    x = x.transpose(1, 4, 2, 5, 0, 3, 6)  # block row, block column, row, column, C, P, P
    x = np.repeat(x[:, :, :, :, :, None], TEMPORAL, 5)
    pixels = torch.from_numpy(np.ascontiguousarray(x.reshape(rows * columns, -1)))
    return {
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, rows, columns]]),
        "mm_token_type_ids": places.int(),
    }


def _qvl_config(ids: dict[str, int]) -> QVLConfig:
    # Without dropout: no scene is repeated, so the model cannot overfit to one.
    return QVLConfig.from_preset(
        "qvl-tiny",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        image_token_id=ids["<|image_pad|>"],
        pad_token_id=ids["<|endoftext|>"],
        eos_token_id=ids["<|im_end|>"],
    )


def _qvl_image_processor() -> QVLImageProcessor:
    return QVLImageProcessor(QVLConfig.from_preset("qvl-tiny").vision_patch_size, MIN_PIXELS, 512 * 512)


def _qvl_image(image: np.ndarray, places: Tensor) -> dict[str, Tensor]:
    """[1, 1, 3, 32, 96]: one sample, one image, no padding."""
    x = (image.astype(np.float32).transpose(2, 0, 1) / 255 - np.float32(0.5)) / np.float32(0.5)
    return {"pixel_values": torch.from_numpy(np.ascontiguousarray(x))[None, None]}


FAMILIES: dict[str, Family] = {
    "qwen3-vl": Family(
        Qwen3VLForConditionalGeneration,
        _qwen3_vl_config,
        _qwen3_vl_image_processor,
        _qwen3_vl_image,
        places=(scenes.HEIGHT // (PATCH * MERGE)) * (scenes.WIDTH // (PATCH * MERGE)),
    ),
    "qvl": Family(QVLForConditionalGeneration, _qvl_config, _qvl_image_processor, _qvl_image, places=1),
}
