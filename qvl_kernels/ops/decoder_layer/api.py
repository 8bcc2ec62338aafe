"""Public names: decoder_layer."""

import torch

from qvl_kernels.ops.decoder_layer.call import DecoderWeights, run_decoder_layer

__all__ = ["decoder_layer"]


def decoder_layer(
    x: torch.Tensor,
    weights: DecoderWeights,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    past: int,
    mask: torch.Tensor | None = None,
    num_heads: int,
    eps: float = 1e-6,
    scale: float | None = None,
) -> torch.Tensor:
    """A fused decoder layer in one call; writes its keys and values into the KV cache. Inference only.

    h = x + o(attention(rope(norm(q)), rope(norm(k)), v)) with q, k, v = linear(rms_norm(x)), then
    y = h + down(swiglu(gate(n), up(n))) with n = rms_norm(h)        [Qwen3VLTextDecoderLayer]

    Args:
        x: [B, T, C] contiguous, fp32, bf16 or fp16.
        weights: DecoderWeights, dtype of x.
        cos, sin: [B or 1, T, D], dtype of x.
        k_cache, v_cache: [B, Hkv, S_cap, D], last dimension contiguous; positions [past, past + T) are overwritten, so
            neither may need gradients or share memory with the other, itself or the inputs.
        past: keys already in the cache.
        mask: None for causal over [0, past + T); or bool (True = visible) / additive in x's dtype, broadcastable to
            [B, H, T, >= past + T], which replaces the causal rule.
        num_heads: query heads H, a multiple of Hkv.
        eps: of all norms. scale: default 1 / sqrt(D).
    Returns:
        [B, T, C].
    Raises: TypeError or ValueError for bad arguments; RuntimeError under gradients or if a forced backend cannot run
    here.
    Example:
        >>> y = qvl_kernels.decoder_layer(x, weights, cos, sin, k_cache, v_cache, past=0, num_heads=16)
    """
    return run_decoder_layer(
        x, weights, cos, sin, k_cache, v_cache, past=past, mask=mask, num_heads=num_heads, eps=eps, scale=scale
    )
