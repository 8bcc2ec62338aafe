"""Reads and writes the YAML of the specification, with its keys in its groups."""

import re
from os import PathLike
from pathlib import Path

import yaml
from transformers import PreTrainedConfig

from qvl_model.yaml_file import Loader

__all__ = ["GROUPS", "read", "write"]

# as the specification's YAML has it; transformers knows the model as "qvl", since it has a qwen3_vl of its own
MODEL_TYPE = "qwen3_vl"
OPEN = "to be specified"

# Group -> (keys of the specification in its order, keys that we add).
GROUPS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "Transformer Configuration": (
        (
            "num_hidden_layers",
            "num_attention_heads",
            "hidden_size",
            "intermediate_size",
            "hidden_act",
            "hidden_dropout_prob",
            "attention_probs_dropout_prob",
            "max_position_embeddings",
            "type_vocab_size",
            "initializer_range",
            "layer_norm_eps",
        ),
        (
            "vocab_size",
            "num_key_value_heads",
            "rope_theta",
            "attention_bias",
            "tie_word_embeddings",
            "pad_token_id",
            "bos_token_id",
            "eos_token_id",
        ),
    ),
    "Vision Encoder Configuration": (
        (
            "vision_model_type",
            "vision_num_hidden_layers",
            "vision_num_attention_heads",
            "vision_hidden_size",
            "vision_patch_size",
            "vision_image_size",
            "vision_intermediate_size",
        ),
        ("vision_num_channels", "vision_hidden_act", "vision_rope_theta"),
    ),
    "Multimodal Configuration": (
        ("multimodal_fusion_type", "num_query_tokens", "vision_projection_dim", "language_projection_dim"),
        (
            "connector_type",
            "connector_num_layers",
            "cross_attention_layers",
            "cross_attention_gate_init",
            "max_num_images",
            "image_token_id",
        ),
    ),
}
_KEYS = [key for keys in GROUPS.values() for part in keys for key in part]


def read(source: str | PathLike) -> tuple[dict, list[str]]:
    """(keys with values, keys marked as open) of a file. Raises: ValueError for unknown or repeated keys."""
    text = Path(source).read_text()
    blocks = re.findall(r"^```ya?ml\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    try:
        documents = [document for block in blocks or [text] for document in yaml.load_all(block, Loader)]
    except yaml.YAMLError as error:
        raise ValueError(f"QVLConfig: {source} is not YAML: {' '.join(str(error).split())}") from error
    keys: dict = {}
    for document in documents:
        if document is not None and not isinstance(document, dict):
            raise ValueError(f"QVLConfig: {source} must hold keys and values, got {document!r}")
        for key, value in (document or {}).items():
            for name, setting in value.items() if isinstance(value, dict) else [(key, value)]:
                if name in keys:
                    raise ValueError(f"QVLConfig: {source} says {name} is {keys[name]!r} and {setting!r}; keep one")
                keys[name] = setting
    model_type = keys.pop("model_type", MODEL_TYPE)
    if model_type not in (MODEL_TYPE, "qvl"):
        raise ValueError(f"QVLConfig: model_type must be {MODEL_TYPE} (or qvl), got {model_type!r}")
    unknown = [key for key in keys if key not in _KEYS]
    if unknown:
        raise ValueError(
            f"QVLConfig: {source} has unknown keys {', '.join(map(str, unknown))}; known are {', '.join(_KEYS)}"
        )
    marked = [key for key, value in keys.items() if value in (OPEN, [OPEN])]
    return {key: value for key, value in keys.items() if key not in marked}, marked


def write(config: PreTrainedConfig, path: str | PathLike | None) -> str:
    lines = [f"model_type: {MODEL_TYPE}"]
    for group, (specified, added) in GROUPS.items():
        lines += ["", f"# {group}"] + [_line(config, key) for key in specified]
        lines += ["# not in the specification:"] + [_line(config, key) for key in added]
    text = "\n".join(lines) + "\n"
    if path is not None:
        Path(path).write_text(text)
    return text


def _line(config: PreTrainedConfig, key: str) -> str:
    value = yaml.safe_dump(getattr(config, key), default_flow_style=True, width=1000).removesuffix("...\n")
    return f"{key}: {value.strip()}"
