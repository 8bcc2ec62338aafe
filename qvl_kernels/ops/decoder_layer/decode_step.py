"""A decoder layer for one new token per row whose positions only the device knows: what a CUDA graph of a decoding step holds."""

import torch

from qvl_kernels.ops.decode_attention import decode_attention
from qvl_kernels.ops.decoder_layer.prepared import PreparedDecoderLayer
from qvl_kernels.ops.linear.op import linear_op
from qvl_kernels.ops.rms_norm.cpu import add_rms_norm_op, rms_norm_op
from qvl_kernels.ops.rope.cpu import qk_norm_rope_op
from qvl_kernels.ops.swiglu.op import swiglu_op

__all__ = ["decode_step"]


def decode_step(
    x: torch.Tensor, layer: PreparedDecoderLayer, cos: torch.Tensor, sin: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
    lengths: torch.Tensor, visible: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """x [B, 1, C] through the layer; its keys and values go to position ``lengths[b]`` of row b of the caches.

    Args:
        x: [B, 1, C]. cos, sin: [B, 1, D], dtype of x.
        k_cache, v_cache: [B, Hkv, S_cap, D].
        lengths: int32 [B] on x's device, keys already in the cache, below S_cap.
        visible: bool [B, 1, 1, S_cap], False at keys that stand for padding.
    Returns:
        [B, 1, C]. Nothing here waits for the device, and every shape is fixed.
    """
    w, batch, head_dim = layer.weights, x.shape[0], layer.head_dim
    normed = rms_norm_op(x, w.input_norm, layer.eps)
    q = linear_op(normed, w.q, w.q_bias).view(batch, 1, layer.num_heads, head_dim)
    k = linear_op(normed, w.k, w.k_bias).view(batch, 1, layer.kv_heads, head_dim)
    v = linear_op(normed, w.v, w.v_bias).view(batch, layer.kv_heads, head_dim)
    q, k = qk_norm_rope_op(q, k, w.q_norm, w.k_norm, cos, sin, layer.eps)
    rows = torch.arange(batch, device=x.device)
    k_cache[rows, :, lengths] = k[:, 0]
    v_cache[rows, :, lengths] = v
    attended = decode_attention(q, k_cache, v_cache, lengths=lengths + 1, mask=visible, scale=layer.scale)
    projected = linear_op(attended.view(batch, 1, -1), w.o, w.o_bias)
    normed, total = add_rms_norm_op(projected, x, w.post_norm, layer.eps)
    return total + linear_op(swiglu_op(linear_op(normed, w.gate, None), linear_op(normed, w.up, None)), w.down, None)
