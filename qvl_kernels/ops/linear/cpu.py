import torch

from qvl_kernels import dispatch
from qvl_kernels.checks import DTYPE_CODES
from qvl_kernels.ops.linear.onednn import use_onednn

__all__ = ["extension_linear", "linear_cpu"]


def linear_cpu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if use_onednn(x, x.numel() // max(1, x.shape[-1])):
        return torch.nn.functional.linear(x, weight, bias)
    return extension_linear(x, weight, bias)


def extension_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1])
    n = weight.shape[0]
    y = torch.empty((*x.shape[:-1], n), dtype=x.dtype)
    dispatch.extension().linear(
        x=rows.data_ptr(), w=weight.data_ptr(), bias=0 if bias is None else bias.data_ptr(), y=y.data_ptr(),
        rows=rows.shape[0], n=n, k=rows.shape[1], x_stride=rows.stride(0), w_stride=weight.stride(0), y_stride=n,
        dtype=DTYPE_CODES[x.dtype],
    )  # fmt: skip
    return y
