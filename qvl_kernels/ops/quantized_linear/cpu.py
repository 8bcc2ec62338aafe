"""quantized_linear on the CPU, over the C++ kernels."""

import torch

from qvl_kernels.ops.linear.extension import extension_linear
from qvl_kernels.quantization import QuantizedWeight

__all__ = ["quantized_linear_cpu"]


def quantized_linear_cpu(
    x: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    return extension_linear(x, QuantizedWeight(values, scales, x.shape[-1], zeros), bias)
