"""attention by PyTorch's flash attention on CPUs (what its scaled_dot_product_attention calls there)."""

import torch

from qvl_kernels.tuning import TILE_K

__all__ = ["pytorch_attention"]


def pytorch_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor | None, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) as ``attention``, without masks; causal attention has as many queries as keys."""
    out = torch.empty(q.shape, dtype=q.dtype)
    if cu_seqlens is None:
        lse = torch.empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
        _attend(q, k, v, out, lse, causal, scale)
        return out, lse
    lse = torch.empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    bounds = cu_seqlens.tolist()
    for begin, end in zip(bounds[:-1], bounds[1:]):
        if begin < end:
            rows = slice(begin, end)
            _attend(q[None, rows], k[None, rows], v[None, rows], out[None, rows], lse[None, :, rows], causal, scale)
    return out, lse


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    causal: bool,
    scale: float,
) -> None:
    """Writes a batch to out [B, T, H, D] and lse [B, H, T]."""
    queries, keys, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask, padding = None, -keys % TILE_K
    if padding:
        k, v = (torch.nn.functional.pad(x, (0, 0, 0, padding)) for x in (k, v))
        if not causal:  # a causal query does not see keys behind the last query
            mask = torch.zeros(1, 1, 1, keys + padding, dtype=q.dtype, device=q.device)
            mask[..., keys:] = float("-inf")
            mask = mask.expand(1, 1, queries, keys + padding)
    if group > 1:
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    attended, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=mask, scale=scale
    )
    out.transpose(1, 2).copy_(attended)
    lse.copy_(sums)
