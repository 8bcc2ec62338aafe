"""The default model of the benchmark: a family's architecture at full size with seeded random bf16 weights, written
once.

python -m bench.checkpoint [--family qvl] [DIRECTORY]    writes it (4.3 GB) where it is missing and prints where it is
"""

import argparse
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.families import Family

__all__ = [
    "FULL_CONFIG",
    "IMAGE_PROCESSOR",
    "RANDOM_KEY",
    "cache_directory",
    "cached_checkpoint",
    "special_token_ids",
    "write_json",
    "write_random",
]

RANDOM_KEY = "qvl_random_weights"  # in config.json: says that answers are noise
SEED = 0
WEIGHT_FILES = ("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json")

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


def _digits_directory() -> Path:
    import qvl_model

    return Path(qvl_model.__file__).parent / "digits" / "checkpoint"


def special_token_ids() -> dict[str, int]:
    """Config key -> id of each token in SPECIAL_TOKENS, in the tokenizer of the shipped digits model."""
    added = {
        token["content"]: token["id"]
        for token in json.loads((_digits_directory() / "tokenizer.json").read_text())["added_tokens"]
    }
    return {key: added[token] for key, token in SPECIAL_TOKENS.items()}


def write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")


def write_random(directory: Path, family: "Family", sizes: dict | None = None) -> Path:
    """Writes a random bf16 checkpoint with the tokenizer of the shipped digits model. Complete, or not there at all.

    Args:
        sizes: keyword arguments of the family's config; its full size if left out.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    config = family.config(**(sizes if sizes is not None else family.full_config()))
    source = _digits_directory()
    temporary = directory.with_name(directory.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    torch.manual_seed(SEED)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)
    model.save_pretrained(temporary)
    for file in source.iterdir():
        if file.name not in WEIGHT_FILES and file.suffix != ".safetensors":
            shutil.copy(file, temporary)
    family.write_image_processor(temporary)
    saved = json.loads((temporary / "config.json").read_text())
    write_json(temporary / "config.json", {**saved, RANDOM_KEY: True})
    shutil.rmtree(directory, ignore_errors=True)
    temporary.rename(directory)
    return directory


def cache_directory() -> Path:
    """$QVL_CACHE, or ~/.cache/qvl."""
    return Path(os.environ.get("QVL_CACHE") or Path.home() / ".cache" / "qvl")


def cached_checkpoint(family: "Family") -> Path:
    """Where the random full-size checkpoint is or will be. The name changes with what is in it."""
    tokenizer = (_digits_directory() / "tokenizer.json").read_bytes()
    key = hashlib.sha256(json.dumps([family.full_config(), IMAGE_PROCESSOR, SEED]).encode() + tokenizer).hexdigest()[:8]
    return cache_directory() / f"{family.name}-2b-random-{key}"


if __name__ == "__main__":
    from bench.families import FAMILIES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, default="qwen3-vl")
    parser.add_argument("directory", type=Path, nargs="?", help="default: in the cache")
    arguments = parser.parse_args()
    chosen = FAMILIES[arguments.family]
    target = arguments.directory or cached_checkpoint(chosen)
    if not target.exists():
        write_random(target, chosen)
    print(target)
