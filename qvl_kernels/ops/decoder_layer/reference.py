"""Reference of decoder_layer: its definition in PyTorch operations."""

from typing import Any

import torch

from qvl_kernels.ops.attention.reference import attention_reference
from qvl_kernels.ops.linear.reference import linear_reference
from qvl_kernels.ops.rms_norm.reference import rms_norm_reference
from qvl_kernels.ops.rope.reference import qk_norm_rope_reference
from qvl_kernels.ops.swiglu.reference import swiglu_reference

__all__ = ["decoder_layer_reference"]


def decoder_layer_reference(
    x: torch.Tensor,
    w: Any,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    past: int,
    mask: torch.Tensor | None,
    num_heads: int,
    eps: float,
    scale: float,
) -> torch.Tensor:
    batch, time, _ = x.shape
    kv_heads, head_dim = k_cache.shape[1], k_cache.shape[3]
    normed = rms_norm_reference(x, w.input_norm, eps)
    q = linear_reference(normed, w.q, w.q_bias).view(batch, time, num_heads, head_dim)
    k = linear_reference(normed, w.k, w.k_bias).view(batch, time, kv_heads, head_dim)
    v = linear_reference(normed, w.v, w.v_bias).view(batch, time, kv_heads, head_dim)
    q, k = qk_norm_rope_reference(q, k, w.q_norm, w.k_norm, cos, sin, eps)
    end = past + time
    k_cache[:, :, past:end] = k.transpose(1, 2)
    v_cache[:, :, past:end] = v.transpose(1, 2)
    attended, _ = attention_reference(
        q,
        k_cache[:, :, :end].transpose(1, 2),
        v_cache[:, :, :end].transpose(1, 2),
        causal=mask is None,
        scale=scale,
        mask=mask,
    )
    x = x + linear_reference(attended.flatten(2), w.o, w.o_bias)
    normed = rms_norm_reference(x, w.post_norm, eps)
    return x + linear_reference(
        swiglu_reference(linear_reference(normed, w.gate, None), linear_reference(normed, w.up, None)), w.down, None
    )
