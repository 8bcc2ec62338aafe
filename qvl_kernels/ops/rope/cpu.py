import torch

from qvl_kernels import dispatch
from qvl_kernels.checks import DTYPE_CODES
from qvl_kernels.library import register
from qvl_kernels.ops.rms_norm.cpu import rms_norm_backward_cpu
from qvl_kernels.ops.rope.reference import rotate_half

__all__ = ["qk_norm_rope_op", "vision_rope_op"]


def _strides(x: torch.Tensor) -> list[int]:
    """Strides of batch, time, head of [B, T, H, D] or [N, H, D]."""
    return [0, x.stride(0), x.stride(1)] if x.dim() == 3 else [x.stride(0), x.stride(1), x.stride(2)]


def _table_strides(x: torch.Tensor) -> list[int]:
    """Strides of batch and time of [B or 1, T, D] or [N, D]."""
    if x.dim() == 2:
        return [0, x.stride(0)]
    return [x.stride(0) if x.shape[0] > 1 else 0, x.stride(1)]


def _rope(q, k, q_weight, k_weight, cos, sin, eps):
    q_out, k_out = torch.empty(q.shape, dtype=q.dtype), torch.empty(k.shape, dtype=k.dtype)
    dispatch.extension().qk_norm_rope(
        q=q.data_ptr(), k=k.data_ptr(), q_out=q_out.data_ptr(), k_out=k_out.data_ptr(), q_strides=_strides(q),
        k_strides=_strides(k), q_out_strides=_strides(q_out), k_out_strides=_strides(k_out),
        q_weight=0 if q_weight is None else q_weight.data_ptr(), k_weight=0 if k_weight is None else k_weight.data_ptr(),
        cos=cos.data_ptr(), sin=sin.data_ptr(), cos_strides=_table_strides(cos), sin_strides=_table_strides(sin),
        table_dtype=DTYPE_CODES[cos.dtype], batch=q.shape[0] if q.dim() == 4 else 1, time=q.shape[-3], heads=q.shape[-2],
        kv_heads=k.shape[-2], head_dim=q.shape[-1], eps=eps, dtype=DTYPE_CODES[q.dtype],
    )  # fmt: skip
    return q_out, k_out


def _fake(q, k, *rest):
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), torch.empty(k.shape, dtype=k.dtype, device=k.device)


def _rope_backward(grad: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """y = x cos + rotate_half(x) sin, so dx = g cos + rotate_half^T(g sin), and rotate_half^T = -rotate_half."""
    g, cos, sin = grad.float(), cos.unsqueeze(-2).float(), sin.unsqueeze(-2).float()
    return g * cos - rotate_half(g * sin)


def _setup(ctx, inputs, output) -> None:
    q, k, q_weight, k_weight, cos, sin, ctx.eps = inputs
    ctx.save_for_backward(q, k, q_weight, k_weight, cos, sin)


def _backward(ctx, grad_q, grad_k):
    q, k, q_weight, k_weight, cos, sin = ctx.saved_tensors
    dq, dqw = rms_norm_backward_cpu(_rope_backward(grad_q, cos, sin), None, q, q_weight, ctx.eps)
    dk, dkw = rms_norm_backward_cpu(_rope_backward(grad_k, cos, sin), None, k, k_weight, ctx.eps)
    return dq, dk, dqw, dkw, None, None, None


def _vision_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[2], inputs[3])


def _vision_backward(ctx, grad_q, grad_k):
    cos, sin = ctx.saved_tensors  # once: checkpointing hands them out a single time
    dq, dk = (_rope_backward(grad, cos, sin).to(grad.dtype) for grad in (grad_q, grad_k))
    return dq, dk, None, None


qk_norm_rope_op = register(
    "qk_norm_rope(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, float eps) -> (Tensor, Tensor)",
    cpu=_rope,
    fake=_fake,
    backward=_backward,
    setup_context=_setup,
)
vision_rope_op = register(
    "vision_rope(Tensor q, Tensor k, Tensor cos, Tensor sin) -> (Tensor, Tensor)",
    cpu=lambda q, k, cos, sin: _rope(q, k, None, None, cos, sin, 0.0),
    fake=_fake,
    backward=_vision_backward,
    setup_context=_vision_setup,
)
