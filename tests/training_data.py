"""Data and a tiny checkpoint for the tests of training: the digits processor around a model of a few thousand weights."""

import json
import shutil
from pathlib import Path

from transformers import Qwen3VLConfig

from qvl_model import digits
from qvl_model.digits.export import write_rows

__all__ = ["settings", "tiny_checkpoint", "write_rows"]


def tiny_checkpoint(directory: Path) -> Path:
    """A checkpoint directory without weights: to be trained with ``random_weights``."""
    shutil.copytree(digits.CHECKPOINT, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    config = Qwen3VLConfig.from_pretrained(digits.CHECKPOINT).to_dict()
    config["text_config"] |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config["text_config"]["rope_parameters"] |= {"mrope_section": [2, 1, 1]}
    config["vision_config"] |= {"depth": 2, "hidden_size": 24, "num_heads": 3, "intermediate_size": 32, "out_hidden_size": 32, "deepstack_visual_indexes": [0]}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def settings(directory: Path, **groups) -> dict:
    """A configuration for ``tiny_checkpoint`` and 24 rows below ``directory``; ``groups`` change single keys."""
    checkpoint, rows = directory / "checkpoint", directory / "data" / "train.jsonl"
    if not checkpoint.exists():
        tiny_checkpoint(checkpoint)
        write_rows(rows, "train", 24)
    base = {
        "model": {"path": str(checkpoint), "random_weights": True},
        "data": {"train": str(rows)},
        "optimizer": {"learning_rate": 3e-3, "warmup": 2},
        "run": {"steps": 6, "batch_size": 4, "accumulation": 1, "precision": "fp32", "device": "cpu"},
        "output": {"directory": str(directory / "out"), "log_every": 1, "save_every": 3, "capacity_every": 2, "progress": False},
    }
    return {name: {**values, **groups.get(name, {})} for name, values in base.items()}
