"""All that differs between the supported versions of transformers, in one place.

Up to 5.23 a KV cache is called ``past_key_values`` in layers, models, ``generate`` and outputs; from 5.24 on ``cache``,
with the old name accepted under a warning. qvl's own code says ``cache``.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.models.qwen3_vl import modeling_qwen3_vl as stock
from transformers.utils import ModelOutput
from transformers.utils.deprecation import deprecate_kwarg

__all__ = [
    "CACHE",
    "CACHE_NAMES",
    "CHECKPOINTING",
    "TESTED_TRANSFORMERS",
    "CacheOutput",
    "drops_cache",
    "takes_cache",
    "update_cache",
]

TESTED_TRANSFORMERS = ("5.17.0", "5.23.0", "5.24.0")  # what the tests run on; for others see self_check.py

# TrainingArguments and models call recomputing activations in the backward one of these.
CHECKPOINTING = (
    "activation_checkpointing"
    if hasattr(PreTrainedModel, "activation_checkpointing_enable")
    else "gradient_checkpointing"
)

CACHE_NAMES = ("cache", "past_key_values")  # the newer one first
_parameters = inspect.signature(stock.Qwen3VLTextModel.forward).parameters
CACHE = next((name for name in CACHE_NAMES if name in _parameters), CACHE_NAMES[0])  # this version's


def takes_cache(forward: Callable) -> Callable:
    """Makes a function with a ``cache`` argument take ``past_key_values`` too, as this version's stock functions do.
    Its signature has the name of this version.
    """
    if CACHE == "cache":
        return deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")(forward)

    @functools.wraps(forward)
    def renamed(*args: Any, **kwargs: Any) -> Any:
        if CACHE in kwargs:
            kwargs["cache"] = kwargs.pop(CACHE)
        return forward(*args, **kwargs)

    signature = inspect.signature(forward)
    renamed.__signature__ = signature.replace(
        parameters=[p.replace(name=CACHE) if p.name == "cache" else p for p in signature.parameters.values()]
    )
    return renamed


def drops_cache(layer: Any) -> bool:
    """Whether stock's call of a decoder layer ignores the KV cache: while activations are recomputed in training, up to
    5.23 without gradients, too.
    """
    return CACHE != "cache" and layer.training and layer.gradient_checkpointing


def update_cache(cache: Cache, k: Tensor, v: Tensor, layer_idx: int, kwargs: dict) -> tuple[Tensor, Tensor]:
    """Puts new keys and values [B, Hkv, T, D] into a KV cache, as stock attention does with its ``kwargs``."""
    return cache.update(k, v, layer_idx, kwargs=kwargs) if CACHE == "cache" else cache.update(k, v, layer_idx)


if CACHE == "cache":
    CacheOutput = ModelOutput  # which reads the old name of its field ``cache`` already
else:

    class CacheOutput(ModelOutput):
        """Base of outputs with a field ``cache`` that can be read as ``past_key_values`` too, as ``generate`` of these
        versions does.
        """

        @property
        def past_key_values(self) -> Cache | None:
            return self.cache

        def __getitem__(self, key: str | int | slice) -> Any:
            return super().__getitem__(_newer(key))

        def __contains__(self, key: object) -> bool:
            return super().__contains__(_newer(key))

        def get(self, key: str, default: Any = None) -> Any:
            return super().get(_newer(key), default)

    def _newer(key: Any) -> Any:
        return "cache" if key == CACHE else key
