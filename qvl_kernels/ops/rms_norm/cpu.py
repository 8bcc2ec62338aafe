"""rms_norm and add_rms_norm on the CPU: forward in C++, backward in PyTorch operations."""

import torch

from qvl_kernels import dispatch
from qvl_kernels.checks import DTYPE_CODES

__all__ = ["add_rms_norm_cpu", "rms_norm_backward_cpu", "rms_norm_cpu"]


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def rms_norm_cpu(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    rows = _rows(x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dispatch.extension().norm(
        x=rows.data_ptr(),
        residual=0,
        weight=weight.data_ptr(),
        bias=0,
        y=y.data_ptr(),
        sum=0,
        rows=rows.shape[0],
        size=rows.shape[1],
        x_stride=rows.stride(0),
        residual_stride=0,
        y_stride=rows.shape[1],
        sum_stride=0,
        eps=eps,
        dtype=DTYPE_CODES[x.dtype],
    )
    return y


def add_rms_norm_cpu(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    x_rows, residual_rows = _rows(x), _rows(residual)
    y, total = torch.empty(x.shape, dtype=x.dtype), torch.empty(x.shape, dtype=x.dtype)
    dispatch.extension().norm(
        x=x_rows.data_ptr(),
        residual=residual_rows.data_ptr(),
        weight=weight.data_ptr(),
        bias=0,
        y=y.data_ptr(),
        sum=total.data_ptr(),
        rows=x_rows.shape[0],
        size=x_rows.shape[1],
        x_stride=x_rows.stride(0),
        residual_stride=residual_rows.stride(0),
        y_stride=x_rows.shape[1],
        sum_stride=x_rows.shape[1],
        eps=eps,
        dtype=DTYPE_CODES[x.dtype],
    )
    return y, total


def rms_norm_backward_cpu(
    grad: torch.Tensor, grad_x: torch.Tensor | None, x: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """With n = x r, r = rsqrt(mean(x^2) + eps) and g = grad * weight: dx = r (g - n mean(g n)) + grad_x, dw = sum(grad
    n).

    Since 1 = mean(n^2) + eps r^2, dx_i = r (g_i (sum of the other n_j^2 / size + eps r^2) - n_i sum of the other g_j
    n_j / size), which does not cancel in rows that one element dominates.
    """
    wide, g, size = x.float(), grad.float(), x.shape[-1]
    r = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    n = wide * r
    gw = g * weight.float()
    squares, products = n * n, gw * n
    other_squares = (squares.sum(-1, keepdim=True) - squares) / size + eps * r * r
    dx = r * (gw * other_squares - n * ((products.sum(-1, keepdim=True) - products) / size))
    if grad_x is not None:
        dx = dx + grad_x
    dw = (g * n).reshape(-1, x.shape[-1]).sum(0)
    return dx.to(x.dtype).contiguous(), dw.to(weight.dtype)
