"""decode_attention on the CPU, over the C++ attention kernel."""

import torch

from qvl_kernels.ops.decode_attention.reference import dequantize_cache

__all__ = ["decode_attention_cpu"]


def decode_attention_cpu(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    lengths: torch.Tensor,
    mask: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    scale: float,
    table: torch.Tensor | None = None,
) -> torch.Tensor:
    """The C++ attention kernel with one length per sequence; the used part of an int8 cache is dequantised first."""
    if k_scale is not None and v_scale is not None:
        used = int(lengths.max()) if lengths.numel() else 0
        k_cache = dequantize_cache(k_cache[:, :, :used], k_scale[:, :, :used], q.dtype)
        v_cache = dequantize_cache(v_cache[:, :, :used], v_scale[:, :, :used], q.dtype)
        mask = mask if mask is None or mask.shape[3] == 1 else mask[..., :used]
    counts = lengths.to(torch.int64).contiguous()
    k, v = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
    return torch.ops.qvl.attention(q, k, v, None, counts, mask, mask is None, scale)[0]
