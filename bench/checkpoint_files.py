"""Files of the benchmark's checkpoints: the published sizes and settings, and where they are kept."""

import json
import os
from pathlib import Path

__all__ = ["FULL_CONFIG", "IMAGE_PROCESSOR", "cache_directory", "digits_directory", "special_token_ids", "write_json"]

# The published sizes of Qwen3-VL-2B-Instruct.
FULL_CONFIG = {
    "tie_word_embeddings": True,
    "text_config": {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5e6,
            "mrope_section": [24, 20, 20],
            "mrope_interleaved": True,
        },
        "tie_word_embeddings": True,
    },
    "vision_config": {
        "depth": 24,
        "hidden_size": 1024,
        "num_heads": 16,
        "intermediate_size": 4096,
        "patch_size": 16,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "out_hidden_size": 2048,
        "deepstack_visual_indexes": [5, 11, 17],
        "num_position_embeddings": 2304,
    },
}
# The published image processor: pixel bounds, patches, and normalisation to [-1, 1].
IMAGE_PROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "size": {"shortest_edge": 65536, "longest_edge": 16777216},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
# Config key of each token that the model must know, and how the tokenizer writes it.
SPECIAL_TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}


def digits_directory() -> Path:
    import qvl_model

    return Path(qvl_model.__file__).parent / "digits" / "checkpoint"


def special_token_ids() -> dict[str, int]:
    """Config key -> id of each token in SPECIAL_TOKENS, in the tokenizer of the shipped digits model."""
    added = {
        token["content"]: token["id"]
        for token in json.loads((digits_directory() / "tokenizer.json").read_text())["added_tokens"]
    }
    return {key: added[token] for key, token in SPECIAL_TOKENS.items()}


def write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")


def cache_directory() -> Path:
    """$QVL_CACHE, or ~/.cache/qvl."""
    return Path(os.environ.get("QVL_CACHE") or Path.home() / ".cache" / "qvl")
