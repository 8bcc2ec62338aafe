"""Strides of attention's tensors, as the C++ kernels take them."""

import torch

__all__ = ["row_strides"]


def row_strides(x: torch.Tensor) -> list[int]:
    """Strides of batch, time and head; a varlen tensor [N, H, D] has no batch."""
    return [0, x.stride(0), x.stride(1)] if x.dim() == 3 else [x.stride(0), x.stride(1), x.stride(2)]
