"""A decoder layer for one new token per row whose positions only the device knows: what a CUDA graph of a decoding step holds."""

import torch

from qvl_kernels.ops.decode_attention import decode_attention
from qvl_kernels.ops.decoder_layer.parts import add_product, gated, normed_products
from qvl_kernels.ops.decoder_layer.prepared import PreparedDecoderLayer
from qvl_kernels.ops.rope.op import qk_norm_rope_to_cache_op

__all__ = ["decode_step"]


def decode_step(
    x: torch.Tensor, layer: PreparedDecoderLayer, cos: torch.Tensor, sin: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
    lengths: torch.Tensor, filled: torch.Tensor, visible: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """x [B, 1, C] through the layer; its keys and values go to position ``lengths[b]`` of row b of the caches.

    Args:
        x: [B, 1, C]. cos, sin: [B, 1, D], dtype of x.
        k_cache, v_cache: [B, Hkv, S_cap, D].
        lengths: int32 [B] on x's device, keys already in the cache, below S_cap.
        filled: int32 [B], lengths + 1, which all layers share.
        visible: bool [B, 1, 1, S_cap], False at keys that stand for padding.
    Returns:
        [B, 1, C]. Nothing here waits for the device, and every shape is fixed.
    """
    w, batch, eps = layer.weights, x.shape[0], layer.eps
    q, k, v = normed_products(x, w.input_norm, eps, [w.q, w.k, w.v], [w.q_bias, w.k_bias, w.v_bias])
    q, k, v = (heads.view(batch, 1, -1, layer.head_dim) for heads in (q, k, v))
    q = qk_norm_rope_to_cache_op(q, k, v, w.q_norm, w.k_norm, cos, sin, k_cache, v_cache, lengths, 0, eps)
    attended = decode_attention(q, k_cache, v_cache, lengths=filled, mask=visible, scale=layer.scale)
    x = add_product(x, attended.view(batch, 1, -1), w.o, w.o_bias)
    return add_product(x, gated(x, w.post_norm, eps, w.gate, w.up), w.down, None)
