"""The base class of QVL models (config, initialisation, flags for transformers), and attention helpers."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.models.qwen3_vl import modeling_qwen3_vl as stock

from qvl_model.compat import CACHE_NAMES
from qvl_model.qvl.configuration import QVLConfig

__all__ = ["QVLPreTrainedModel", "attend", "eager", "eager_config", "key_mask", "rotary_angles"]


class QVLPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation of QVL models."""

    config: QVLConfig
    config_class = QVLConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["QVLDecoderLayer", "QVLVisionBlock", "QVLConnectorLayer"]
    _skip_keys_device_placement = list(CACHE_NAMES)
    _supports_sdpa = True
    _supports_attention_backend = False

    def __init__(self, config: QVLConfig, *args: Any, **kwargs: Any) -> None:
        config.check()  # it may have been edited since it was made
        super().__init__(config, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        for name, parameter in module._parameters.items():
            if name == "gate":
                init.constant_(parameter, float(self.config.cross_attention_gate_init))
            elif name in ("queries", "positions"):
                init.normal_(parameter, mean=0.0, std=self.config.initializer_range)


def attend(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float = 0.0
) -> tuple[Tensor, Tensor | None]:
    """Attention as the config of ``module`` asks for. q [B, H, T, D], k and v [B, Hkv, S, D], additive mask [B, 1, 1,
    S].

    Returns [B, T, H, D], and the weights [B, H, T, S] if they are computed (eager).
    """
    function = stock.ALL_ATTENTION_FUNCTIONS.get_interface(
        module.config._attn_implementation, stock.eager_attention_forward
    )
    return function(
        module, q, k, v, mask, dropout=dropout if module.training else 0.0, scaling=module.scaling, is_causal=False
    )


def eager_config(config: QVLConfig) -> QVLConfig:
    """``config`` with eager attention, which returns weights; a copy, unless it is set already."""
    if config._attn_implementation != "eager":
        config = copy.copy(config)
        config._attn_implementation = "eager"
    return config


def eager(attention: nn.Module) -> nn.Module:
    """``attention`` with eager attention. A shallow copy that shares weights, children and hooks, so that calls in
    other threads are not affected.
    """
    twin = copy.copy(attention)
    twin.config = eager_config(attention.config)
    return twin


def rotary_angles(positions: Tensor, dim: int, theta: float) -> Tensor:
    """Angles [..., dim / 2], fp32, of positions [...]: position * theta^(-2i / dim)."""
    frequencies = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device) / dim)
    return positions[..., None].float() * frequencies


def key_mask(lengths: Tensor | None, keys: int, dtype: torch.dtype) -> Tensor | None:
    """Additive mask [B, 1, 1, S] of the keys beyond ``lengths`` [B]; None if no key is masked.

    A sample of length 0 attends to the first key, and callers drop its result: with all scores masked, softmax could
    give NaN in fp16.
    """
    if lengths is None:
        return None
    hidden = torch.arange(keys, device=lengths.device)[None] >= lengths.clamp(min=1)[:, None]
    return torch.zeros(hidden.shape, dtype=dtype, device=lengths.device).masked_fill(hidden, torch.finfo(dtype).min)[
        :, None, None
    ]
