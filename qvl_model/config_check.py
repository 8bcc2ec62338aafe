"""Whether the numbers of a config and of a generation config can be those of a model: what transformers takes as it is,
and fails on much later, or never ends with.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

__all__ = ["check_config", "check_generation", "check_parts"]

# Inclusive bounds of sizes, by name without "vision_". Far above what there is, and far below what fills a memory.
_SIZES = {
    "depth": (1, 1024),
    "head_dim": (2, 4096),
    "hidden_size": (1, 1 << 17),
    "in_channels": (1, 64),
    "intermediate_size": (1, 1 << 20),
    "max_position_embeddings": (1, 1 << 30),
    "num_attention_heads": (1, 4096),
    "num_heads": (1, 4096),
    "num_hidden_layers": (1, 1024),
    "num_key_value_heads": (1, 4096),
    "num_position_embeddings": (1, 1 << 24),
    "out_hidden_size": (1, 1 << 17),
    "patch_size": (1, 1024),
    "spatial_merge_size": (1, 64),
    "temporal_patch_size": (1, 64),
    "vocab_size": (1, 1 << 24),
}


def check_parts(values: Mapping[str, Any]) -> None:
    """Raises: ValueError for parts of a config.json that are no mappings, in whose place transformers takes those of
    another model.
    """
    for name in ("text_config", "vision_config"):
        if name in values and not isinstance(values[name], dict):
            raise ValueError(f"{name} must be a mapping, got {values[name]!r}")


def check_config(config: PreTrainedConfig) -> None:
    """Raises: ValueError, naming the setting, for what no model has."""
    for place, part in _parts(config):
        for name, value in part.to_dict().items():
            bounds = _SIZES.get(name.removeprefix("vision_"))
            if bounds is not None and value is not None:
                _check_size(f"{place}{name}", value, *bounds)
        _check_heads(place, part)
        for name in ("hidden_act", "vision_hidden_act"):
            value = getattr(part, name, None)
            if value is not None and value not in ACT2FN:
                raise ValueError(f"{place}{name} is {value!r}, which is no activation of transformers")
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None)
    kind = rope.get("rope_type", "default") if isinstance(rope, dict) else "default"
    if kind != "default" and kind not in ROPE_INIT_FUNCTIONS:
        raise ValueError(f"rope_parameters has the rope_type {kind!r}, which transformers does not know")


def _parts(config: PreTrainedConfig) -> Iterator[tuple[str, PreTrainedConfig]]:
    yield "", config
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PreTrainedConfig):
            yield f"{name}.", part


def _check_size(name: str, value: object, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    if not least <= value <= most:
        raise ValueError(f"{name} is {value}, and must be from {least} to {most}")


def _check_heads(place: str, part: PreTrainedConfig) -> None:
    heads, groups = (getattr(part, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    if isinstance(heads, int) and isinstance(groups, int) and heads % groups:
        raise ValueError(f"{place}num_attention_heads is {heads}, no multiple of the {groups} of num_key_value_heads")
    for size, of in (("hidden_size", "num_heads"), ("vision_hidden_size", "vision_num_attention_heads")):
        width, heads = getattr(part, size, None), getattr(part, of, None)
        if isinstance(width, int) and isinstance(heads, int) and width % (2 * heads):
            raise ValueError(f"{place}{size} is {width}, no multiple of twice the {heads} of {of}")
    depth, taken = getattr(part, "depth", None), getattr(part, "deepstack_visual_indexes", None)
    if isinstance(depth, int) and isinstance(taken, list | tuple):
        for index in taken:
            if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < depth:
                raise ValueError(f"{place}deepstack_visual_indexes has {index!r}, and there are {depth} blocks")


def check_generation(config: GenerationConfig, vocabulary: int) -> None:
    """Raises: ValueError, naming the setting, for values with which ``generate`` fails or means nothing."""

    def number(name: str, most: float = float("inf"), *, whole: bool = False) -> None:
        value = getattr(config, name, None)
        kinds = (int,) if whole else (int, float)
        if value is not None and (isinstance(value, bool) or not isinstance(value, kinds) or not 0 <= value <= most):
            raise ValueError(
                f"{name} is {value!r}, and must be {'an integer' if whole else 'a number'} from 0 to {most:g}"
            )

    number("temperature")
    number("top_p", 1.0)
    number("top_k", whole=True)
    number("repetition_penalty")
    if config.do_sample is not None and not isinstance(config.do_sample, bool):
        raise ValueError(f"do_sample is {config.do_sample!r}, and must be true or false")
    for name in ("eos_token_id", "pad_token_id", "bos_token_id"):
        value = getattr(config, name, None)
        for token in value if isinstance(value, list) else [] if value is None else [value]:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocabulary:
                raise ValueError(f"{name} is {value!r}, and must be of the {vocabulary} tokens of the vocabulary")
