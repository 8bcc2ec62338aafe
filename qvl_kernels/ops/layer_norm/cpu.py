"""layer_norm and add_layer_norm on the CPU: forward in C++, backward in PyTorch operations."""

import torch

from qvl_kernels import dispatch
from qvl_kernels.checks import DTYPE_CODES

__all__ = ["add_layer_norm_cpu", "layer_norm_backward_cpu", "layer_norm_cpu"]


def layer_norm_cpu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    return add_layer_norm_cpu(x, None, weight, bias, eps)[0]


def add_layer_norm_cpu(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    residual_rows = None if residual is None else residual.reshape(x.shape[:-1].numel(), x.shape[-1])
    y = torch.empty(x.shape, dtype=x.dtype)
    total = None if residual is None else torch.empty(x.shape, dtype=x.dtype)
    dispatch.extension().norm(
        x=rows.data_ptr(),
        residual=0 if residual_rows is None else residual_rows.data_ptr(),
        weight=weight.data_ptr(),
        bias=bias.data_ptr(),
        y=y.data_ptr(),
        sum=0 if total is None else total.data_ptr(),
        rows=rows.shape[0],
        size=rows.shape[1],
        x_stride=rows.stride(0),
        residual_stride=0 if residual_rows is None else residual_rows.stride(0),
        y_stride=rows.shape[1],
        sum_stride=rows.shape[1],
        eps=eps,
        dtype=DTYPE_CODES[x.dtype],
    )
    return y, total


def layer_norm_backward_cpu(
    grad: torch.Tensor, grad_x: torch.Tensor | None, x: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """With n = (x - mean) r and g = grad * weight: dx = r (g - mean(g) - n mean(g n)) + grad_x, dw = sum(grad n), db =
    sum(grad).
    """
    wide, g = x.float(), grad.float()
    centred = wide - wide.mean(-1, keepdim=True)
    r = torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps)
    n = centred * r
    gw = g * weight.float()
    dx = r * (gw - gw.mean(-1, keepdim=True) - n * (gw * n).mean(-1, keepdim=True))
    if grad_x is not None:
        dx = dx + grad_x
    dw = (g * n).reshape(-1, x.shape[-1]).sum(0)
    db = g.reshape(-1, x.shape[-1]).sum(0)
    return dx.to(x.dtype).contiguous(), dw.to(weight.dtype), db.to(weight.dtype)
