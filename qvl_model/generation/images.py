"""Cross-attention of QVL in a captured decode step. Keys and values of images are in buffers that may grow or move
without a new capture.
"""

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from qvl_kernels.ops.attention.api import unsupported_heads
from qvl_kernels.ops.decoder_layer.decode_step import cross_attention_step
from qvl_kernels.ops.decoder_layer.growing_caches import GrowingCaches
from qvl_model.modules import qvl as qvl_modules
from qvl_model.modules.fast_path import attends_as_stock, is_eligible, is_number, kernels_take, only_capture_hooks
from qvl_model.modules.linear import Linear
from qvl_model.modules.text import Qwen3VLTextRMSNorm
from qvl_model.quantization.modules import PackedLinear
from qvl_model.qvl import text

__all__ = ["Images", "layers_with_images", "why_not"]

_IMPLEMENTATIONS = ("sdpa", "eager")  # of cross-attention; both compute what the kernel computes


def why_not(body: nn.Module) -> str | None:
    """Why cross-attention cannot be captured as the model is now, or None. Qwen3-VL has no cross-attention."""
    for index, layer in enumerate(body.layers):
        fusion = getattr(layer, "fusion", None)
        if fusion is not None and not _fusion_is_eligible(fusion, body.norm.weight.dtype):
            return f"the cross-attention of decoder layer {index} is not eligible for the fast path"
    return None


def _fusion_is_eligible(fusion: nn.Module, dtype: torch.dtype) -> bool:
    attention, dropout = fusion.attn, fusion.dropout
    if (
        not is_eligible(fusion, text.QVLFusion)
        or type(attention) is not qvl_modules.QVLCrossAttention
        or "forward" in attention.__dict__
    ):
        return False
    implementation = attention.config._attn_implementation
    if (
        not only_capture_hooks(attention, "cross_attentions")
        or implementation not in _IMPLEMENTATIONS
        or not attends_as_stock(implementation)
    ):
        return False
    if "gate" not in fusion._parameters or not is_number(attention.scaling):
        return False
    if attention.q_proj.out_features != attention.k_proj.out_features * attention.num_key_value_groups:
        return False
    if (
        not is_eligible(dropout, nn.Dropout)
        or dropout.training
        and dropout.p > 0.0
        or attention.training
        and attention.attention_dropout > 0.0
    ):
        return False
    norms, linears = (fusion.norm, attention.q_norm), (attention.q_proj, attention.o_proj)
    if not all(is_eligible(norm, Qwen3VLTextRMSNorm) and is_number(norm.variance_epsilon) for norm in norms):
        return False
    if not all(type(linear) in (Linear, PackedLinear) and is_eligible(linear, type(linear)) for linear in linears):
        return False
    weights = [
        fusion.gate,
        *(norm.weight for norm in norms),
        *(linear.weight for linear in linears if type(linear) is Linear),
    ]
    weights += [linear.bias for linear in linears if linear.bias is not None]
    return (
        fusion.gate.dtype is dtype
        and kernels_take(*weights)
        and unsupported_heads(fusion.gate, attention.head_dim) is None
    )


def layers_with_images(body: nn.Module, cache: Cache) -> tuple[int, ...]:
    """Indices of the decoder layers for which the cache has keys and values of images."""
    fusions = [(index, getattr(layer, "fusion", None)) for index, layer in enumerate(body.layers)]
    return tuple(index for index, fusion in fusions if fusion is not None and fusion.memory(None, cache) is not None)


class Images:
    """Keys and values of images that some decoder layers attend to; one graph serves all sizes and numbers of images.

    Args:
        body: the language model.
        layers: indices of these layers, one or more.
        rows: sequences of the step.
    """

    def __init__(self, body: nn.Module, layers: tuple[int, ...], rows: int) -> None:
        self._fusions, self._loaded = {index: body.layers[index].fusion for index in layers}, []
        attention, weight = self._fusions[layers[0]].attn, body.norm.weight
        kv_heads = attention.q_proj.out_features // attention.head_dim // attention.num_key_value_groups
        self._caches = GrowingCaches(len(layers), rows, kv_heads, attention.head_dim, weight.dtype, weight.device)
        with torch.inference_mode(False):  # serves calls outside of inference mode, too
            self._lengths = torch.zeros(
                len(layers), rows, dtype=torch.int32, device=weight.device
            )  # cache_seqlens; 0 for sequences without images, and beyond the batch

    def load(self, cache: Cache, batch: int) -> None:
        """Copies keys, values and lengths from a cache of ``batch`` sequences."""
        self._lengths.zero_()
        self._loaded = self._of(cache)
        for position, (keys, values, lengths) in enumerate(self._loaded):
            keys, values = keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1)
            self._caches.take(position, keys, values, length=keys.shape[2])
            self._lengths[position, :batch] = keys.shape[2] if lengths is None else lengths

    def are_in(self, cache: Cache) -> bool:
        """Whether the cache still has the tensors that ``load`` copied."""
        return all(x is y for old, new in zip(self._loaded, self._of(cache)) for x, y in zip(old, new))

    def _of(self, cache: Cache) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        return [fusion.memory(None, cache) for fusion in self._fusions.values()]

    def add(self, index: int, hidden: Tensor) -> Tensor:
        """hidden [B, 1, C] of decoder layer ``index`` plus its gated cross-attention to images, if it has any."""
        if index not in self._fusions:
            return hidden
        fusion, position = self._fusions[index], [*self._fusions].index(index)
        attention = fusion.attn
        q = attention.q_norm(attention.q_proj(fusion.norm(hidden)).view(hidden.shape[0], 1, -1, attention.head_dim))
        out = cross_attention_step(q, self._caches, position, self._lengths[position], attention.scaling)
        return hidden + fusion.gate.tanh() * attention.o_proj(out.flatten(2))

    def tensors(self) -> list[Tensor]:
        caches = self._caches
        return [self._lengths, caches.table, caches.mask, *caches.keys, *caches.values]

    def clear(self) -> None:
        """Frees keys and values."""
        self._caches.clear()
        self._loaded = []
