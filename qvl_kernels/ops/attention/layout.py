"""How tensors of attention lie in memory."""

import torch

__all__ = ["row_strides"]


def row_strides(x: torch.Tensor) -> list[int]:
    """Strides of batch, time, head; a packed [N, H, D] tensor has no batch."""
    return [0, x.stride(0), x.stride(1)] if x.dim() == 3 else [x.stride(0), x.stride(1), x.stride(2)]
