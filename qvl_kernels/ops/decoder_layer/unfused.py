"""The unfused decoder layer, from single ops: on GPUs, and on CPUs where PyTorch's kernels make it faster."""

from collections.abc import Sequence

import torch

from qvl_kernels.library import call
from qvl_kernels.ops.attention.op import attention_op
from qvl_kernels.ops.decoder_layer.parts import linear_residual, linear_swiglu, norm_linears
from qvl_kernels.ops.rope.op import qk_norm_rope_to_cache_op
from qvl_kernels.quantization import QuantizedWeight

__all__ = ["unfused_decoder_layer"]


def unfused_decoder_layer(
    x: torch.Tensor,
    norms: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor | QuantizedWeight],
    biases: Sequence[torch.Tensor | None],
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
    """As ``decoder_layer``; any weight may be a QuantizedWeight."""
    batch, time, _ = x.shape
    kv_heads, head_dim, end = k_cache.shape[1], k_cache.shape[3], past + time
    input_norm, q_norm, k_norm, post_norm = norms
    q_w, k_w, v_w, o_w, gate_w, up_w, down_w = weights
    *qkv_biases, o_b = biases
    q, k, v = norm_linears(x, input_norm, eps, [q_w, k_w, v_w], qkv_biases)
    q, k, v = (
        heads.view(batch, time, count, head_dim) for heads, count in ((q, num_heads), (k, kv_heads), (v, kv_heads))
    )
    q = qk_norm_rope_to_cache_op(q, k, v, q_norm, k_norm, cos, sin, k_cache, v_cache, None, past, eps)
    keys, values = k_cache[:, :, :end].transpose(1, 2), v_cache[:, :, :end].transpose(1, 2)
    mask = None if mask is None else mask[..., :end]
    attended, _ = call(attention_op, q, keys, values, None, None, mask, mask is None, scale, 0.0, None)
    del q, k, v, keys, values  # peak memory is in the MLP
    x = linear_residual(x, attended.flatten(2), o_w, o_b)
    del attended
    return linear_residual(x, linear_swiglu(x, post_norm, eps, gate_w, up_w), down_w, None)
