"""linear on the CPU: the C++ kernel or oneDNN."""

import torch

from qvl_kernels.ops.linear.extension import extension_linear
from qvl_kernels.ops.linear.onednn import use_onednn
from qvl_kernels.ops.linear.pytorch import pytorch_linear

__all__ = ["linear_cpu"]


def linear_cpu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if use_onednn(x, x.numel() // max(1, x.shape[-1]), weight):
        return pytorch_linear(x, weight, bias)
    return extension_linear(x, weight, bias)
