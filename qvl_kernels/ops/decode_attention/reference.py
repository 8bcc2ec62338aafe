"""Reference of decode_attention: its definition in PyTorch operations."""

import torch

from qvl_kernels.ops.attention.reference import attention_reference

__all__ = ["decode_attention_reference", "dequantize_cache"]


def dequantize_cache(cache: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """cache * scale: int8 [B, Hkv, S, D] times [B, Hkv, S]."""
    wide = torch.promote_types(scale.dtype, torch.float32)
    cache = cache.to(wide, memory_format=torch.contiguous_format)  # its rows may overlap
    return (cache * scale[..., None].to(wide)).to(dtype)


def decode_attention_reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    lengths: torch.Tensor,
    mask: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    outs = []
    for b, length in enumerate(lengths.tolist()):
        k, v = (cache[b : b + 1, :, :length] for cache in (k_cache, v_cache))
        if k_scale is not None and v_scale is not None:
            k, v = (dequantize_cache(x, s[b : b + 1, :, :length], q.dtype) for x, s in ((k, k_scale), (v, v_scale)))
        row_mask = None
        if mask is not None:
            row_mask = mask[b if mask.shape[0] > 1 else 0][None, ..., :length]
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        outs.append(attention_reference(q[b : b + 1], k, v, causal=mask is None, scale=scale, mask=row_mask)[0])
    return torch.cat(outs) if outs else torch.empty_like(q)
