"""The specification of a model: the modules and parameters that its config describes, built on the meta device."""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel, Qwen3VLConfig

from qvl_model.checkpoint_files import load_config
from qvl_model.qvl import QVLConfig

__all__ = ["SPECS", "CapacitySpec", "heads_of", "innermost"]

OWN_PACKAGES = ("transformers", "torch", "qvl_model")  # a class from elsewhere may do anything in its forward
# Sizes that are not checked: they follow the data, or name a row that may be zero.
_FREE_SIZES = ("padding_idx", "max_seq_len_cached", "original_max_seq_len")
# Numbers that make a module do nothing if they are 0 or huge.
_FACTORS = ("scaling", "attention_scaling", "eps", "variance_epsilon")


# The published sizes of Qwen3-VL's dense models; heads have 128 channels, the vocabulary 151,936 tokens.
_SMALL_VISION = dict(depth=24, hidden_size=1024, intermediate_size=4096, deepstack_visual_indexes=[5, 11, 17])
_LARGE_VISION = dict(depth=27, hidden_size=1152, intermediate_size=4304, deepstack_visual_indexes=[8, 16, 24])
_QWEN3_VL: dict[str, dict[str, Any]] = {
    "2b": dict(hidden=2048, mlp=6144, layers=28, heads=16, tied=True, vision=_SMALL_VISION),
    "4b": dict(hidden=2560, mlp=9728, layers=36, heads=32, tied=True, vision=_SMALL_VISION),
    "8b": dict(hidden=4096, mlp=12288, layers=36, heads=32, tied=False, vision=_LARGE_VISION),
    "32b": dict(hidden=5120, mlp=25600, layers=64, heads=64, tied=False, vision=_LARGE_VISION),
}


def qwen3_vl(size: str = "2b") -> Qwen3VLConfig:
    """The published sizes of Qwen3-VL-2B-Instruct (2,127,532,032 parameters), "4b", "8b" or "32b"."""
    sizes = _QWEN3_VL[size]
    return Qwen3VLConfig(
        text_config=dict(
            hidden_size=sizes["hidden"],
            intermediate_size=sizes["mlp"],
            num_hidden_layers=sizes["layers"],
            num_attention_heads=sizes["heads"],
            num_key_value_heads=8,
            head_dim=128,
            vocab_size=151936,
            tie_word_embeddings=sizes["tied"],
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 5e6,
                "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            },
        ),
        vision_config=dict(
            num_heads=16,
            patch_size=16,
            temporal_patch_size=2,
            spatial_merge_size=2,
            out_hidden_size=sizes["hidden"],
            num_position_embeddings=2304,
            **sizes["vision"],
        ),
        tie_word_embeddings=sizes["tied"],
    )


SPECS: dict[str, Callable[[], PreTrainedConfig]] = {
    **{f"qwen3-vl-{size}": functools.partial(qwen3_vl, size) for size in _QWEN3_VL},
    "qvl-2b": lambda: QVLConfig.from_preset("qvl-2b"),
}


def innermost(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside DistributedDataParallel and torch.compile."""
    while not isinstance(model, PreTrainedModel):
        inner = getattr(model, "module", None) or getattr(model, "_orig_mod", None)
        if inner is None:
            raise TypeError(f"capacity: takes a transformers model of Qwen3-VL or QVL, got {type(model).__name__}")
        model = inner
    return model


def _defining_class(cls: type) -> type:
    """The class of the model before FSDP2 replaced it by a subclass."""
    return next(base for base in cls.__mro__ if not base.__module__.startswith("torch."))


@dataclass(frozen=True)
class CapacitySpec:
    """The modules and parameters of a model.

    Attributes:
        name: how messages call it.
        modules: module name -> (class, sizes): whole-number attributes such as num_heads, factors such as an
            attention's scaling, and how many entries a list has.
        parameters: parameter name -> shape; a shared tensor is listed under each of its names.
        shared: parameter name -> the first name of the tensor, for those that share one by design (tied embeddings).
        count: number of parameters, each tensor once.
    """

    name: str
    modules: dict[str, tuple[type[nn.Module], dict[str, object]]] = field(repr=False)
    parameters: dict[str, tuple[int, ...]] = field(repr=False)
    shared: dict[str, str]
    count: int

    @classmethod
    def of(cls, spec: "CapacitySpec | PreTrainedConfig | str", model_class: type | None = None) -> "CapacitySpec":
        """The specification that a name of ``SPECS``, a config or a specification stands for.

        Args:
            model_class: class of the model that is to be compared (with a head or without); None takes the one with a
                head.
        Raises: ValueError for an unknown name; TypeError for a config that does not fit the class.
        """
        if isinstance(spec, CapacitySpec):
            return spec
        name = "its own config"
        if isinstance(spec, str):
            if spec not in SPECS:
                raise ValueError(
                    f"capacity: unknown specification {spec!r}; known are {', '.join(SPECS)}, or give a config"
                )
            name, spec = spec, SPECS[spec]()
        return cls.from_config(spec, model_class, name)

    @classmethod
    def from_config(
        cls, config: PreTrainedConfig, model_class: type | None = None, name: str = "its config"
    ) -> "CapacitySpec":
        """Lists modules and parameters of the model that ``config`` describes, built on the meta device."""
        if model_class is None:
            model_class = cast(type, AutoModelForImageTextToText._model_mapping[type(config)])
        kind: Any = _defining_class(model_class)
        if not isinstance(config, kind.config_class):
            raise TypeError(
                f"capacity: {kind.__name__} is described by {kind.config_class.__name__}, got {type(config).__name__}"
            )
        with torch.device("meta"):
            model: PreTrainedModel = kind(copy.deepcopy(config))
        parameters: dict[str, tuple[int, ...]] = {}
        shared: dict[str, str] = {}
        first: dict[int, str] = {}
        for key, parameter in model.named_parameters(remove_duplicate=False):
            parameters[key] = tuple(parameter.shape)
            if first.setdefault(id(parameter), key) != key:
                shared[key] = first[id(parameter)]
        return cls(
            name,
            {key: (type(module), sizes_of(module)) for key, module in model.named_modules(remove_duplicate=False)},
            parameters,
            shared,
            sum(parameter.numel() for parameter in model.parameters()),
        )

    @classmethod
    def from_file(cls, path: Path) -> "CapacitySpec":
        """The specification in a config.json (or the directory of one)."""
        return cls.from_config(load_config(path), name=str(path))


def sizes_of(module: nn.Module) -> dict[str, object]:
    """The sizes and scale factors among the attributes of a module."""
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return {"entries": len(module)}

    def counts(key: str, value: object) -> bool:
        if isinstance(value, (list, tuple)):
            return bool(value) and all(type(item) is int for item in value)
        return type(value) is int or key in _FACTORS

    return {
        key: tuple(value) if isinstance(value, (list, tuple)) else value
        for key, value in vars(module).items()
        if not key.startswith("_") and key not in _FREE_SIZES and counts(key, value)
    }


def heads_of(module: nn.Module) -> int | None:
    """How many query heads an attention module has; None for other modules."""
    head_dim = getattr(module, "head_dim", None)
    if "Attention" not in type(module).__name__ or not isinstance(head_dim, int):
        return None
    num_heads = getattr(module, "num_heads", None)
    if isinstance(num_heads, int):
        return num_heads
    query: Any = getattr(module, "q_proj", None)
    return query.out_features // head_dim if hasattr(query, "out_features") else None
