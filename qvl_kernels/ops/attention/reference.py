"""Reference of attention: its definition in PyTorch operations."""

import math

import torch

__all__ = ["attention_reference", "varlen_attention_reference"]


def visible_mask(
    queries: int, keys: int, causal: bool, key_padding_mask: torch.Tensor | None, device: torch.device
) -> torch.Tensor | None:
    """Bool [B or 1, 1, T, S], True where a query may see a key; None where all may."""
    visible = None
    if causal:
        visible = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)[None, None]
    if key_padding_mask is not None:
        padding = key_padding_mask[:, None, None, :]
        visible = padding if visible is None else visible & padding
    return visible


def attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool,
    scale: float,
    key_padding_mask: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [B, T, H, D], lse [B, H, T] fp32 or wider). Order: scale, additive mask, boolean masks, softmax, dropout."""
    group = q.shape[2] // k.shape[2]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    # Padding must not count, not even as NaN * 0: keys and values are zeroed.
    if key_padding_mask is not None:
        keep = key_padding_mask[:, :, None, None]
        k, v = k.masked_fill(~keep, 0), v.masked_fill(~keep, 0)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = (q.to(wide) @ k.to(wide).transpose(2, 3)) * scale
    visible = visible_mask(q.shape[2], k.shape[2], causal, key_padding_mask, q.device)
    if mask is not None and mask.dtype == torch.bool:
        visible = mask if visible is None else visible & mask
    elif mask is not None:
        scores = scores + mask.to(wide)
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    if scores.shape[-1] == 0:
        lse = torch.full(scores.shape[:-1], -math.inf, dtype=wide, device=q.device)
    else:
        lse = torch.logsumexp(scores, -1)
    empty = lse == -math.inf
    p = torch.softmax(scores.masked_fill(empty[..., None], 0.0), -1).masked_fill(empty[..., None], 0.0)
    if dropout_p > 0.0:
        p = torch.nn.functional.dropout(p, dropout_p)
    out = (p @ v.to(wide)).to(v.dtype)
    return out.transpose(1, 2), lse


def varlen_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    causal: bool,
    scale: float,
    dropout_p: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Varlen: sequences of [N, H, D] one by one; lse [H, N]."""
    outs, lses = (
        [q[:0]],
        [q.new_zeros(q.shape[1], 0, dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)],
    )
    bounds = cu_seqlens.tolist()
    for begin, end in zip(bounds[:-1], bounds[1:]):
        part = slice(begin, end)
        out, lse = attention_reference(
            q[None, part], k[None, part], v[None, part], causal=causal, scale=scale, dropout_p=dropout_p
        )
        outs.append(out[0])
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, 1)
