"""attention over the C++ kernel."""

import torch

from qvl_kernels import dispatch
from qvl_kernels.checks import DTYPE_CODES
from qvl_kernels.ops.attention.layout import row_strides

__all__ = ["extension_attention", "mask_arguments"]


def mask_arguments(mask: torch.Tensor | None, shape: tuple[int, int, int, int]) -> tuple[int, int, list[int]]:
    """(kind, pointer, strides with 0 where broadcast) of a mask that broadcasts to ``shape``."""
    if mask is None:
        return 0, 0, [0, 0, 0, 0]
    full = mask.expand(shape)
    return (1 if mask.dtype == torch.bool else 2), full.data_ptr(), list(full.stride())


def extension_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    key_counts: torch.Tensor | None,
    mask: torch.Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) as ``attention``; ``key_counts`` int32 [B]: each sample sees so many keys."""
    varlen = cu_seqlens is not None
    batch = q.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    queries, heads, head_dim = q.shape[-3:]
    keys, kv_heads = k.shape[-3], k.shape[-2]
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty((heads, queries) if varlen else (batch, heads, queries), dtype=torch.float32)
    kind, pointer, strides = mask_arguments(mask, (batch, heads, queries, keys))
    dispatch.extension().attention(
        q=q.data_ptr(),
        k=k.data_ptr(),
        v=v.data_ptr(),
        out=out.data_ptr(),
        lse=lse.data_ptr(),
        batch=batch,
        queries=queries,
        keys=keys,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        q_strides=row_strides(q),
        k_strides=row_strides(k),
        v_strides=row_strides(v),
        out_strides=row_strides(out),
        scale=scale,
        causal=causal,
        key_counts=0 if key_counts is None else key_counts.data_ptr(),
        cu_seqlens=0 if cu_seqlens is None else cu_seqlens.data_ptr(),
        mask_kind=kind,
        mask=pointer,
        mask_strides=strides,
        dtype=DTYPE_CODES[q.dtype],
    )
    return out, lse
