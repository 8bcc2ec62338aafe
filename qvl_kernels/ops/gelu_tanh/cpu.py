"""gelu_tanh on the CPU: forward in C++, backward in PyTorch operations."""

import torch

from qvl_kernels import dispatch
from qvl_kernels.checks import DTYPE_CODES

__all__ = ["gelu_tanh_backward_cpu", "gelu_tanh_cpu"]


def gelu_tanh_cpu(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    size = x.shape[-1]
    rows = x.reshape(x.shape[:-1].numel(), size)
    y = torch.empty(x.shape, dtype=x.dtype)
    dispatch.extension().gelu_tanh(
        x=rows.data_ptr(),
        bias=0 if bias is None else bias.data_ptr(),
        y=y.data_ptr(),
        rows=rows.shape[0],
        size=size,
        x_stride=rows.stride(0),
        y_stride=size,
        dtype=DTYPE_CODES[x.dtype],
    )
    return y


def gelu_tanh_backward_cpu(grad: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    wide = x.float() if bias is None else x.float() + bias.float()
    return torch.ops.aten.gelu_backward(grad.float(), wide, approximate="tanh").to(x.dtype).contiguous()
