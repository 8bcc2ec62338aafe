"""Reference of vision_block: its definition in PyTorch operations."""

from typing import Any

import torch

from qvl_kernels.ops.attention.reference import varlen_attention_reference
from qvl_kernels.ops.gelu_tanh.reference import gelu_tanh_reference
from qvl_kernels.ops.layer_norm.reference import layer_norm_reference
from qvl_kernels.ops.linear.reference import linear_reference
from qvl_kernels.ops.rope.reference import vision_rope_reference

__all__ = ["vision_block_reference"]


def vision_block_reference(
    x: torch.Tensor, w: Any, cos: torch.Tensor, sin: torch.Tensor, cu_seqlens: torch.Tensor, num_heads: int, eps: float
) -> torch.Tensor:
    tokens = x.shape[0]
    normed = layer_norm_reference(x, w.norm1_w, w.norm1_b, eps)
    q, k, v = linear_reference(normed, w.qkv_w, w.qkv_b).view(tokens, 3, num_heads, x.shape[1] // num_heads).unbind(1)
    q, k = vision_rope_reference(q, k, cos, sin)
    attended, _ = varlen_attention_reference(
        q, k, v, cu_seqlens, causal=False, scale=q.shape[-1] ** -0.5, dropout_p=0.0
    )
    x = x + linear_reference(attended.flatten(1), w.proj_w, w.proj_b)
    normed = layer_norm_reference(x, w.norm2_w, w.norm2_b, eps)
    return x + linear_reference(gelu_tanh_reference(linear_reference(normed, w.fc1_w, w.fc1_b), None), w.fc2_w, w.fc2_b)
