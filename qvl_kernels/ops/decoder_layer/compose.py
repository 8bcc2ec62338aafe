"""The layer from single ops, its linear layers through PyTorch: on GPUs, and on processors whose matrix units make those faster."""

import torch

from qvl_kernels.ops.attention.cpu import attention_op
from qvl_kernels.ops.rms_norm.cpu import add_rms_norm_op, rms_norm_op
from qvl_kernels.ops.rope.cpu import qk_norm_rope_op
from qvl_kernels.ops.swiglu.op import swiglu_op

__all__ = ["compose_decoder_layer"]


def compose_decoder_layer(x, norms, weights, biases, cos, sin, k_cache, v_cache, past, mask, num_heads, eps, scale):
    linear = torch.nn.functional.linear
    batch, time, _ = x.shape
    kv_heads, head_dim, end = k_cache.shape[1], k_cache.shape[3], past + time
    input_norm, q_norm, k_norm, post_norm = norms
    q_w, k_w, v_w, o_w, gate_w, up_w, down_w = weights
    q_b, k_b, v_b, o_b = biases
    normed = rms_norm_op(x, input_norm, eps)
    q = linear(normed, q_w, q_b).view(batch, time, num_heads, head_dim)
    k = linear(normed, k_w, k_b).view(batch, time, kv_heads, head_dim)
    q, k = qk_norm_rope_op(q, k, q_norm, k_norm, cos, sin, eps)
    k_cache[:, :, past:end] = k.transpose(1, 2)
    v_cache[:, :, past:end] = linear(normed, v_w, v_b).view(batch, time, kv_heads, head_dim).transpose(1, 2)
    keys, values = k_cache[:, :, :end].transpose(1, 2), v_cache[:, :, :end].transpose(1, 2)
    mask = None if mask is None else mask[..., :end]
    attended, _ = attention_op(q, keys, values, None, None, mask, mask is None, scale)
    normed, total = add_rms_norm_op(linear(attended.view(batch, time, -1), o_w, o_b), x, post_norm, eps)
    return total + linear(swiglu_op(linear(normed, gate_w), linear(normed, up_w)), down_w)
