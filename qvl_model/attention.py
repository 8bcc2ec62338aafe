"""qvl's attention for other models of transformers: ``attn_implementation="qvl"``, registered at import."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import qvl_kernels
from qvl_model.modules.fast_path import dropout_fits, is_number, kernels_take, mask_fits

__all__ = ["NAME", "attention_forward"]

NAME = "qvl"
_REFUSED = ("softcap", "s_aux", "head_mask")  # of attention functions; they change what attention computes


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers' "sdpa" computes, by qvl's kernels; calls that these do not take go to "sdpa".

    Args: as ``transformers.integrations.sdpa_attention.sdpa_attention_forward``: query [B, H, T, D], key and value
        [B, Hkv, S, D]; attention_mask bool or additive, [B, H, T, S] or broadcast to it.
    Returns: ([B, T, H, D], None).
    Raises: ValueError for softcap, attention sinks (s_aux) and head_mask.
    Example:
        >>> model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="qvl")
    """
    for name in _REFUSED:
        if kwargs.get(name) is not None:
            raise ValueError(f"attn_implementation='qvl' has no {name}; use 'eager' or another one that has")
    queries, keys = query.shape[2], key.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = causal and queries > 1 and attention_mask is None
    if (
        not isinstance(causal, bool)  # traced with free shapes
        or kwargs.get("position_bias") is not None
        or key.shape != value.shape
        or query.shape[0] != key.shape[0]
        or causal
        and keys < queries  # sdpa aligns its causal mask at the first key
        or not (scaling is None or is_number(scaling))
        or not dropout_fits(dropout, query)
        or not mask_fits(attention_mask, query, key)
        or not kernels_take(query, key, value)
    ):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    if causal and keys > queries:  # the first call with a static cache; the others are masked
        key, value = key[:, :, :queries], value[:, :, :queries]
    out = qvl_kernels.attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        causal=causal,
        mask=attention_mask,
        scale=scaling,
        dropout_p=dropout,
    )
    assert isinstance(out, torch.Tensor)
    return out, None


def attention_mask(*args: Any, config: PreTrainedConfig | None = None, **kwargs: Any) -> Tensor | None:
    """The masks of "sdpa". Raises: ValueError for models that do not support it, whose own code would misread them."""
    kind = None if config is None else MODEL_MAPPING.get(type(config), None)
    if isinstance(kind, type) and not getattr(kind, "_supports_sdpa", False):
        raise ValueError(f"attn_implementation='qvl' is for models that support 'sdpa', which {kind.__name__} does not")
    return sdpa_mask(*args, config=config, **kwargs)


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, attention_mask)
