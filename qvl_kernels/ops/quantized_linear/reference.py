"""Reference of quantized_linear: its definition in PyTorch operations."""

import torch

from qvl_kernels.quantization import QuantizedWeight, dequantize

__all__ = ["quantized_linear_reference"]


def quantized_linear_reference(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.nn.functional.linear(x, dequantize(weight, x.dtype), bias)
