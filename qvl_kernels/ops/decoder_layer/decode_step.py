"""A decoder layer and cross-attention for one decode step, as a decode CUDA graph captures them: lengths stay on the
GPU.
"""

import torch

from qvl_kernels import dispatch
from qvl_kernels.library import call
from qvl_kernels.ops.attention.api import unsupported_heads
from qvl_kernels.ops.cross_attention.api import cross_attention
from qvl_kernels.ops.decode_attention.api import decode_attention
from qvl_kernels.ops.decode_attention.op import decode_attention_op
from qvl_kernels.ops.decoder_layer.growing_caches import GrowingCaches
from qvl_kernels.ops.decoder_layer.parts import linear_residual, linear_swiglu, norm_linears
from qvl_kernels.ops.decoder_layer.prepared import PreparedDecoderLayer
from qvl_kernels.ops.rope.op import qk_norm_rope_to_cache_op

__all__ = ["cross_attention_step", "decode_step"]


def decode_step(
    x: torch.Tensor,
    layer: PreparedDecoderLayer,
    cos: torch.Tensor,
    sin: torch.Tensor,
    caches: GrowingCaches,
    index: int,
    lengths: torch.Tensor,
    cache_seqlens: torch.Tensor,
) -> torch.Tensor:
    """One token per row through the layer; its keys and values are written at position ``lengths[b]`` of row b.

    Args:
        x: [B, 1, C]. cos, sin: [B, 1, D], dtype of x.
        caches: KV caches of all layers, with B rows. index: of the layer.
        lengths: int32 [B] on x's device, cache_seqlens before this token. Without room for another key nothing is
            written.
        cache_seqlens: int32 [B], lengths + 1 (with this token), shared by all layers.
    Returns:
        [B, 1, C]. Nothing synchronises with the device, and no shape depends on the caches' capacity: a captured graph
        stays valid while they grow.
    Raises: ValueError for caches of another dtype, or for other rows or heads.
    """
    w, batch, eps = layer.weights, x.shape[0], layer.eps
    sizes = (x.dtype, batch, layer.kv_heads, layer.head_dim)
    if caches.sizes != sizes:  # kernels read an address and cannot check the caches' shape
        raise ValueError(
            f"decode_step: caches must be of (dtype, rows, key/value heads, head_dim) {sizes}, got {caches.sizes}"
        )
    q, k, v = norm_linears(x, w.input_norm, eps, [w.q, w.k, w.v], [w.q_bias, w.k_bias, w.v_bias])
    q, k, v = (heads.view(batch, 1, -1, layer.head_dim) for heads in (q, k, v))
    keys, values, entry = caches.keys[index], caches.values[index], caches.entries[index]
    mask = caches.mask[:, None, None, : keys.shape[2]]
    q = qk_norm_rope_to_cache_op(q, k, v, w.q_norm, w.k_norm, cos, sin, keys, values, lengths, 0, eps, entry)
    if dispatch.choose("decode_step", x.device, unsupported_heads(x, layer.head_dim)) == "triton":
        attended = call(decode_attention_op, q, keys, values, cache_seqlens, mask, None, None, layer.scale, entry)
    else:
        attended = decode_attention(q, keys, values, lengths=cache_seqlens, mask=mask, scale=layer.scale)
    x = linear_residual(x, attended.view(batch, 1, -1), w.o, w.o_bias)
    return linear_residual(x, linear_swiglu(x, w.post_norm, eps, w.gate, w.up), w.down, None)


def cross_attention_step(
    q: torch.Tensor, caches: GrowingCaches, index: int, lengths: torch.Tensor, scale: float
) -> torch.Tensor:
    """softmax(q k^T scale) v over keys and values that the caches already hold.

    Args:
        q: [B, 1, H, D], of one new token per row.
        caches: with B rows; ``set_mask`` has masked none of their keys. index: of the layer.
        lengths: int32 [B] on q's device, cache_seqlens.
    Returns:
        [B, 1, H, D]; 0 for rows without keys. As in ``decode_step``, no shape depends on the caches' capacity.
    Raises: ValueError for caches of another dtype, or for other rows or heads.
    """
    dtype, rows, kv_heads, head_dim = caches.sizes
    if (dtype, rows, head_dim) != (q.dtype, q.shape[0], q.shape[3]) or q.shape[2] % kv_heads:
        raise ValueError(
            f"cross_attention_step: caches of (dtype, rows, key/value heads, head_dim) {caches.sizes} do not fit q "
            f"{q.dtype} {tuple(q.shape)}"
        )
    keys, values = caches.keys[index], caches.values[index]
    if dispatch.choose("cross_attention_step", q.device, unsupported_heads(q, head_dim)) == "triton":
        return call(decode_attention_op, q, keys, values, lengths, None, None, None, scale, caches.entries[index])
    return cross_attention(q, keys.transpose(1, 2), values.transpose(1, 2), kv_lens=lengths, scale=scale)
