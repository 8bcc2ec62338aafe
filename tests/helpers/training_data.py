"""Data and tiny checkpoints for the training tests: the digits tokenizer with models of a few thousand weights."""

import json
import shutil
from pathlib import Path

from transformers import Qwen3VLConfig

from qvl_model import digits
from qvl_model.digits.export import write_rows
from qvl_model.qvl import QVLConfig
from qvl_model.qvl.processing import QVLImageProcessor

__all__ = ["settings", "tiny_checkpoint", "write_rows"]


def _qwen3_vl() -> dict:
    config = Qwen3VLConfig.from_pretrained(digits.CHECKPOINT).to_dict()
    config["text_config"] |= {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    config["text_config"]["rope_parameters"] |= {"mrope_section": [2, 1, 1]}
    config["vision_config"] |= {
        "depth": 2,
        "hidden_size": 24,
        "num_heads": 3,
        "intermediate_size": 32,
        "out_hidden_size": 32,
        "deepstack_visual_indexes": [0],
    }
    return config


def _qvl() -> dict:
    return QVLConfig.from_preset(
        "qvl-tiny",
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        hidden_size=32,
        intermediate_size=48,
        dtype="bfloat16",
        vision_num_hidden_layers=2,
        vision_num_attention_heads=2,
        vision_hidden_size=24,
        vision_patch_size=16,
        vision_intermediate_size=32,
        vision_projection_dim=24,
        language_projection_dim=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        max_num_images=2,
        cross_attention_layers=[0, 1],
    ).to_dict()


def tiny_checkpoint(directory: Path, family: str = "qwen3_vl") -> Path:
    """A checkpoint directory without weights: to be trained with ``random_weights``."""
    shutil.copytree(digits.CHECKPOINT, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    if family == "qvl":
        QVLImageProcessor(patch_size=16, min_pixels=32 * 32).save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(_qvl() if family == "qvl" else _qwen3_vl()))
    return directory


def settings(directory: Path, family: str = "qwen3_vl", **groups) -> dict:
    """A configuration for ``tiny_checkpoint`` and 24 rows below ``directory``; ``groups`` change single keys."""
    checkpoint, rows = directory / family, directory / "data" / "train.jsonl"
    if not checkpoint.exists():
        tiny_checkpoint(checkpoint, family)
    if not rows.exists():
        write_rows(rows, "train", 24)
    base = {
        "model": {"path": str(checkpoint), "random_weights": True},
        "data": {"train": str(rows)},
        "optimizer": {"learning_rate": 3e-3, "warmup": 2},
        "run": {"steps": 6, "batch_size": 4, "accumulation": 1, "precision": "fp32", "device": "cpu"},
        "output": {
            "directory": str(directory / "out"),
            "log_every": 1,
            "save_every": 3,
            "capacity_every": 2,
            "progress": False,
        },
    }
    return {name: {**values, **groups.get(name, {})} for name, values in base.items()}
