"""The unfused vision block: on GPUs, under tracing with quantised weights, and where PyTorch's kernels are faster."""

from collections.abc import Sequence

import torch

from qvl_kernels.library import call
from qvl_kernels.ops.attention.op import attention_op
from qvl_kernels.ops.decoder_layer.parts import matmul
from qvl_kernels.ops.gelu_tanh.op import gelu_tanh_op
from qvl_kernels.ops.layer_norm.op import add_layer_norm_op, layer_norm_op
from qvl_kernels.ops.rope.op import vision_rope_op
from qvl_kernels.quantization import QuantizedWeight

__all__ = ["unfused_vision_block"]


def unfused_vision_block(
    x: torch.Tensor,
    norms: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor | QuantizedWeight],
    biases: Sequence[torch.Tensor],
    cos: torch.Tensor,
    sin: torch.Tensor,
    cu_seqlens: torch.Tensor,
    num_heads: int,
    eps: float,
) -> torch.Tensor:
    """As ``vision_block``; any weight may be a QuantizedWeight."""
    tokens = x.shape[0]
    (qkv_w, proj_w, fc1_w, fc2_w), (qkv_b, proj_b, fc1_b, fc2_b) = weights, biases
    norm1_w, norm1_b, norm2_w, norm2_b = norms
    q, k, v = (
        matmul(call(layer_norm_op, x, norm1_w, norm1_b, eps), qkv_w, qkv_b)
        .view(tokens, 3, num_heads, x.shape[1] // num_heads)
        .unbind(1)
    )
    q, k = call(vision_rope_op, q, k, cos, sin)
    attended, _ = call(attention_op, q, k, v, cu_seqlens, None, None, False, q.shape[-1] ** -0.5, 0.0, None)
    del q, k, v  # peak memory is in the MLP
    normed, total = call(add_layer_norm_op, matmul(attended.flatten(1), proj_w, proj_b), x, norm2_w, norm2_b, eps)
    del attended
    return total + matmul(call(gelu_tanh_op, matmul(normed, fc1_w, fc1_b), None), fc2_w, fc2_b)
