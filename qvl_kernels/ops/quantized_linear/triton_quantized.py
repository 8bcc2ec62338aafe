"""quantized_linear on GPUs: GEMV kernels for few tokens, else an int8 GEMM or PyTorch's GEMM on a dequantised copy."""

import torch

from qvl_kernels.gpu.views import as_rows
from qvl_kernels.ops.gemv.launch import launch_quantized_gemv
from qvl_kernels.ops.linear.pytorch import pytorch_linear
from qvl_kernels.ops.quantized_linear import tiles
from qvl_kernels.ops.quantized_linear.triton_dequantize import launch_dequantize
from qvl_kernels.ops.quantized_linear.triton_int8 import launch_int8_matmul

__all__ = ["launch_quantized_linear"]


def launch_quantized_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    rows = as_rows(x)
    kernel = tiles.quantized_linear_kernel(rows.shape[0], 8 if values.dtype == torch.int8 else 4)
    if kernel == "gemv":
        return launch_quantized_gemv(x, values, scales, zeros, bias, None, 0.0, None)
    if kernel == "dequantize":
        return pytorch_linear(x, launch_dequantize(values, scales, zeros, x.shape[-1], x.dtype), bias)
    y = torch.empty((*x.shape[:-1], values.shape[0]), dtype=x.dtype, device=x.device)
    launch_int8_matmul(rows, values, scales, bias, as_rows(y))
    return y
