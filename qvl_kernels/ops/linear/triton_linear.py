"""linear on GPUs: GEMV kernels for few tokens (memory-bound), else PyTorch (cuBLAS, hipBLASLt)."""

import torch

from qvl_kernels.ops.gemv.launch import launch_gemv
from qvl_kernels.ops.gemv.tiles import is_small_m
from qvl_kernels.ops.linear.pytorch import pytorch_linear

__all__ = ["launch_linear"]


def launch_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if is_small_m(x):
        return launch_gemv(x, weight, bias, None, 0.0, None)
    return pytorch_linear(x, weight, bias)
