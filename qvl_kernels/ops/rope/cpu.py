"""qk_norm_rope and vision_rope on the CPU: forward in C++, backward in PyTorch operations."""

import torch

from qvl_kernels import dispatch
from qvl_kernels.checks import DTYPE_CODES
from qvl_kernels.ops.rms_norm.cpu import rms_norm_backward_cpu
from qvl_kernels.ops.rope.reference import rotate_half

__all__ = [
    "qk_norm_rope_backward_cpu",
    "qk_norm_rope_cpu",
    "qk_norm_rope_to_cache_cpu",
    "vision_rope_backward_cpu",
    "vision_rope_cpu",
]


def _strides(x: torch.Tensor) -> list[int]:
    """Strides of batch, time and head of [B, T, H, D] or, varlen, [N, H, D]."""
    return [0, x.stride(0), x.stride(1)] if x.dim() == 3 else [x.stride(0), x.stride(1), x.stride(2)]


def _table_strides(x: torch.Tensor) -> list[int]:
    """Strides of batch and time of a cos/sin cache [B or 1, T, D] or [N, D]."""
    if x.dim() == 2:
        return [0, x.stride(0)]
    return [x.stride(0) if x.shape[0] > 1 else 0, x.stride(1)]


def vision_rope_cpu(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return qk_norm_rope_cpu(q, k, None, None, cos, sin, 0.0)


def qk_norm_rope_cpu(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    q_out, k_out = torch.empty(q.shape, dtype=q.dtype), torch.empty(k.shape, dtype=k.dtype)
    dispatch.extension().qk_norm_rope(
        q=q.data_ptr(),
        k=k.data_ptr(),
        q_out=q_out.data_ptr(),
        k_out=k_out.data_ptr(),
        q_strides=_strides(q),
        k_strides=_strides(k),
        q_out_strides=_strides(q_out),
        k_out_strides=_strides(k_out),
        q_weight=0 if q_weight is None else q_weight.data_ptr(),
        k_weight=0 if k_weight is None else k_weight.data_ptr(),
        cos=cos.data_ptr(),
        sin=sin.data_ptr(),
        cos_strides=_table_strides(cos),
        sin_strides=_table_strides(sin),
        cos_sin_dtype=DTYPE_CODES[cos.dtype],
        batch=q.shape[0] if q.dim() == 4 else 1,
        time=q.shape[-3],
        heads=q.shape[-2],
        kv_heads=k.shape[-2],
        head_dim=q.shape[-1],
        eps=eps,
        dtype=DTYPE_CODES[q.dtype],
    )
    return q_out, k_out


def qk_norm_rope_to_cache_cpu(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    lengths: torch.Tensor | None,
    past: int,
    eps: float,
    table: torch.Tensor | None = None,
) -> torch.Tensor:
    q, k = qk_norm_rope_cpu(q, k, q_weight, k_weight, cos, sin, eps)
    time, capacity = k.shape[1], k_cache.shape[2]
    if lengths is None and 0 <= past <= capacity - time:
        k_cache[:, :, past : past + time] = k.transpose(1, 2)
        v_cache[:, :, past : past + time] = v.transpose(1, 2)
        return q
    positions = (
        torch.arange(past, past + time) + (torch.zeros(k.shape[0], 1) if lengths is None else lengths[:, None]).long()
    )
    rows, times = ((positions >= 0) & (positions < capacity)).nonzero(as_tuple=True)
    for cache, new in ((k_cache, k), (v_cache, v)):
        cache[rows, :, positions[rows, times]] = new[rows, times]
    return q


def _rope_backward(grad: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """y = x cos + rotate_half(x) sin, so dx = grad cos - rotate_half(grad sin), as rotate_half^T = -rotate_half."""
    g, cos, sin = grad.float(), cos.unsqueeze(-2).float(), sin.unsqueeze(-2).float()
    return g * cos - rotate_half(g * sin)


def qk_norm_rope_backward_cpu(
    grad_q: torch.Tensor,
    grad_k: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    dq, dqw = rms_norm_backward_cpu(_rope_backward(grad_q, cos, sin), None, q, q_weight, eps)
    dk, dkw = rms_norm_backward_cpu(_rope_backward(grad_k, cos, sin), None, k, k_weight, eps)
    return dq, dk, dqw, dkw


def vision_rope_backward_cpu(
    grad_q: torch.Tensor, grad_k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    dq, dk = (_rope_backward(grad, cos, sin).to(grad.dtype).contiguous() for grad in (grad_q, grad_k))
    return dq, dk
