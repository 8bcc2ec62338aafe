"""linear on the CPU: the C++ kernel or PyTorch's linear."""

import torch

from qvl_kernels.ops.linear.extension import extension_linear
from qvl_kernels.ops.linear.pytorch import pytorch_linear
from qvl_kernels.ops.linear.selection import use_pytorch

__all__ = ["linear_cpu"]


def linear_cpu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if use_pytorch(x.dtype, x.shape[:-1].numel(), weight):
        return pytorch_linear(x, weight, bias)
    return extension_linear(x, weight, bias)
