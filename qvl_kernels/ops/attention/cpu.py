"""attention on the CPU: the C++ kernel or PyTorch's; backward in PyTorch operations, query block by query block."""

import torch

from qvl_kernels.ops.attention.extension import extension_attention
from qvl_kernels.ops.attention.pytorch import pytorch_attention
from qvl_kernels.ops.attention.selection import use_pytorch

__all__ = ["attention_backward_cpu", "attention_cpu"]

BACKWARD_QUERIES = 512  # query rows whose scores the backward holds at once


def attention_cpu(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    key_counts: torch.Tensor | None,
    mask: torch.Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    if dropout_p > 0.0:
        raise RuntimeError("attention: the C++ kernel has no dropout; the reference and Triton have")
    sequences = 1 if cu_seqlens is None else cu_seqlens.numel() - 1
    masked = key_counts is not None or mask is not None
    if not masked and use_pytorch(q.dtype, q.shape[-3], k.shape[-3], q.shape[-1], causal, sequences):
        return pytorch_attention(q, k, v, cu_seqlens, causal, scale)
    return extension_attention(q, k, v, cu_seqlens, key_counts, mask, causal, scale)


def _sequence_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad: torch.Tensor,
    grad_lse: torch.Tensor | None,
    visible_keys: torch.Tensor | None,
    mask: torch.Tensor | None,
    causal: bool,
    scale: float,
    mask_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Gradients of one batch [B, T, H, D] in fp32.

    dP = dO V^T, dS = P (dP - rowsum(dO O) + dlse), dQ = scale dS K, dK = scale dS^T Q, dV = P^T dO.
    """
    batch, queries, heads, head_dim = q.shape
    keys, kv_heads = k.shape[1], k.shape[2]
    group = heads // kv_heads

    def split(x: torch.Tensor) -> torch.Tensor:  # [B, T, H, D] -> [B, Hkv, G, T, D]
        return x.float().reshape(batch, -1, kv_heads, group, head_dim).permute(0, 2, 3, 1, 4)

    kf, vf = k.float().transpose(1, 2), v.float().transpose(1, 2)  # [B, Hkv, S, D]
    seen = visible_keys
    if mask is not None:
        mask_visible = (mask if mask.dtype == torch.bool else mask > float("-inf")).flatten(1, 2).any(1)
        seen = mask_visible if seen is None else seen & mask_visible
    if seen is not None:  # keys masked for all queries may hold NaN, and 0 * NaN is NaN
        masked_keys = ~seen[:, None, :, None]
        kf, vf = kf.masked_fill(masked_keys, 0), vf.masked_fill(masked_keys, 0)
    dq = torch.zeros(batch, kv_heads, group, queries, head_dim, dtype=torch.float32, device=q.device)
    dk, dv = torch.zeros_like(kf), torch.zeros_like(vf)
    dmask = torch.zeros_like(mask, dtype=torch.float32) if mask is not None and mask_grad else None
    qf, of, gf = split(q), split(out), split(grad)
    lse = lse.reshape(batch, kv_heads, group, queries, 1)
    delta = (of * gf).sum(-1, keepdim=True)
    if grad_lse is not None:
        delta = delta - grad_lse.reshape(batch, kv_heads, group, queries, 1)
    key_index = torch.arange(keys, device=q.device)
    for begin in range(0, queries, BACKWARD_QUERIES):
        rows = slice(begin, min(begin + BACKWARD_QUERIES, queries))
        scores = torch.einsum("bhgtd,bhsd->bhgts", qf[:, :, :, rows], kf) * scale
        masked_pairs = None
        if causal:
            last = torch.arange(rows.start, rows.stop, device=q.device) + keys - queries
            masked_pairs = (key_index[None, :] > last[:, None])[None, None, None]
        if visible_keys is not None:
            padding = ~visible_keys[:, None, None, None, :]
            masked_pairs = padding if masked_pairs is None else masked_pairs | padding
        if mask is not None:
            full = mask.expand(batch, heads, queries, keys)[:, :, rows].reshape(batch, kv_heads, group, -1, keys)
            if mask.dtype == torch.bool:
                masked_pairs = ~full if masked_pairs is None else masked_pairs | ~full
            else:
                scores = scores + full.float()
        if masked_pairs is not None:
            scores = scores.masked_fill(masked_pairs, float("-inf"))
        # Not exp(scores - lse): with an additive mask as large as the dtype, lse cannot hold the logarithm of the sum.
        p = torch.softmax(scores, -1).masked_fill(lse[:, :, :, rows] == float("-inf"), 0.0)
        ds = p * (torch.einsum("bhgtd,bhsd->bhgts", gf[:, :, :, rows], vf) - delta[:, :, :, rows])
        dv += torch.einsum("bhgts,bhgtd->bhsd", p, gf[:, :, :, rows])
        if dmask is not None:
            part = ds.reshape(batch, heads, -1, keys)
            target = dmask if dmask.shape[2] == 1 else dmask[:, :, rows]
            target += part.sum_to_size(*target.shape)
        ds = ds * scale
        dq[:, :, :, rows] = torch.einsum("bhgts,bhsd->bhgtd", ds, kf)
        dk += torch.einsum("bhgts,bhgtd->bhsd", ds, qf[:, :, :, rows])
    dq = dq.permute(0, 3, 1, 2, 4).reshape(q.shape)
    return dq, dk.transpose(1, 2), dv.transpose(1, 2), dmask


def attention_backward_cpu(
    grad: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    key_counts: torch.Tensor | None,
    mask: torch.Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: torch.Tensor | None,
    mask_grad: bool,
) -> tuple[torch.Tensor, ...]:
    if cu_seqlens is None:
        visible = None
        if key_counts is not None:
            visible = torch.arange(k.shape[1], device=q.device)[None] < key_counts[:, None]
        dq, dk, dv, dmask = _sequence_backward(
            q, k, v, out, lse, grad, grad_lse, visible, mask, causal, scale, mask_grad
        )
    else:
        dmask = None
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
        bounds = cu_seqlens.tolist()
        for begin, end in zip(bounds[:-1], bounds[1:]):
            s = slice(begin, end)
            part_lse = None if grad_lse is None else grad_lse[None, :, s]
            parts = _sequence_backward(
                q[None, s],
                k[None, s],
                v[None, s],
                out[None, s],
                lse[None, :, s],
                grad[None, s],
                part_lse,
                None,
                None,
                causal,
                scale,
                False,
            )
            for whole, part in zip((dq, dk, dv), parts[:3]):
                whole[s] = part[0]
    dmask = q.new_empty(0) if dmask is None or mask is None else dmask.to(mask.dtype)
    return *(dx.to(x.dtype).contiguous() for dx, x in ((dq, q), (dk, k), (dv, v))), dmask
