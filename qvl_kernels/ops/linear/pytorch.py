"""PyTorch's own linear, where it is the faster kernel."""

import torch

__all__ = ["pytorch_linear"]


def pytorch_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """torch.nn.functional.linear in the dtypes of its arguments: autocast, which casts them, is for callers of kernel
    functions to obey.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return torch.nn.functional.linear(x, weight, bias)
    return torch.nn.functional.linear(x, weight, bias)
