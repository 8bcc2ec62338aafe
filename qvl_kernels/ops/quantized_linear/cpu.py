"""quantized_linear on the CPU: the C++ kernels, or PyTorch's linear on dequantised weights."""

import torch

from qvl_kernels.ops.linear.extension import extension_linear
from qvl_kernels.ops.linear.selection import use_pytorch
from qvl_kernels.ops.quantized_linear.selection import dequantized_linear
from qvl_kernels.quantization import QuantizedWeight

__all__ = ["quantized_linear_cpu"]


def quantized_linear_cpu(
    x: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    weight = QuantizedWeight(values, scales, x.shape[-1], zeros)
    if use_pytorch(x.dtype, x.shape[:-1].numel(), weight):
        return dequantized_linear(x, weight, bias)
    return extension_linear(x, weight, bias)
