"""The default model of the benchmark: a family's architecture at full size with seeded random bf16 weights, written
once.

python -m bench.checkpoint [--family qvl] [DIRECTORY]    writes it (4.3 GB) where it is missing and prints its path
"""

import argparse
import hashlib
import json
import shutil
from pathlib import Path

from bench.checkpoint_files import IMAGE_PROCESSOR, cache_directory, digits_directory, write_json
from bench.families import FAMILIES, Family

__all__ = ["RANDOM_KEY", "cached_checkpoint", "random_checkpoint", "write_random"]

RANDOM_KEY = "qvl_random_weights"  # in config.json: marks random weights: answers are noise
SEED = 0
WEIGHT_FILES = ("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json")


def write_random(directory: Path, family: Family, sizes: dict | None = None) -> Path:
    """Writes a random bf16 checkpoint with the tokenizer of the shipped digits model. Complete, or not there at all.

    Args:
        sizes: keyword arguments of the family's config; its full size if left out.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    config = family.config(**(sizes if sizes is not None else family.full_config()))
    source = digits_directory()
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


def cached_checkpoint(family: Family) -> Path:
    """Path of the random full-size checkpoint. The name depends on its contents."""
    tokenizer = (digits_directory() / "tokenizer.json").read_bytes()
    key = hashlib.sha256(json.dumps([family.full_config(), IMAGE_PROCESSOR, SEED]).encode() + tokenizer).hexdigest()[:8]
    return cache_directory() / f"{family.name}-2b-random-{key}"


def random_checkpoint(family: Family) -> Path:
    """``cached_checkpoint``, written where it is missing."""
    path = cached_checkpoint(family)
    return path if path.is_dir() else write_random(path, family)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, default="qwen3-vl")
    parser.add_argument("directory", type=Path, nargs="?", help="default: in the cache")
    arguments = parser.parse_args()
    chosen = FAMILIES[arguments.family]
    target = arguments.directory or cached_checkpoint(chosen)
    if not target.exists():
        write_random(target, chosen)
    print(target)
